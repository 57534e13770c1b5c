"""The command line: `lamina run`, `chat`, `plan`, `bench`, `split` and `verify`.

A thin face over `lamina.api` and `lamina.store`. It parses and checks the request, shows progress and writes
results; it knows nothing about checkpoints, plans or streams. Only this package prints. Nothing here imports torch
before a request is known to be well formed, so that help and mistakes are answered at once.
"""
