"""`lamina split`: a checkpoint written again, unit by unit, in the order in which it is read, and smaller if wanted.

What is written is an ordinary folder of safetensors files with one manifest beside them (docs/store-format.md).
"""

from lamina.store.place import default_folder, is_store_of
from lamina.store.split import SplitResult, split
from lamina.store.verify import Fault, Verification, verify

__all__ = ["Fault", "SplitResult", "Verification", "default_folder", "is_store_of", "split", "verify"]
