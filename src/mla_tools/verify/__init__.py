"""Is an output what was written, and does it agree with what will load it?"""

from mla_tools.verify.files import Verified, verify_output
from mla_tools.verify.manifest import ManifestCheck, compare
from mla_tools.verify.tokenizer import TokenizerCheck

__all__ = ["ManifestCheck", "TokenizerCheck", "Verified", "compare", "verify_output"]
