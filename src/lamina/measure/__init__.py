"""What a model's time goes to: the benchmark, the profile, the timeline."""
