"""Is an output what was written, and does it agree with the model class that will load it?"""

from mla_tools.verify.files import Verified, verify_output
from mla_tools.verify.manifest import ManifestCheck, compare

__all__ = ["ManifestCheck", "Verified", "compare", "verify_output"]
