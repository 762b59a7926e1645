"""Tiny random checkpoints in the hub's real layout, for demos, tests and bug reports.

They are made by running a family's table backwards: random values for every tensor of the model, the
inverse of each rule, and the format asked for. So they need neither torch nor transformers.

`configs/` has one config.json for each family, named after it, as on the hub and written out in
full. What JSON has no room to say there: the last of the `compress_ratios` of DeepSeek V4 and V4.1 is that of
an MTP layer; Kimi K2 has no yarn, because transformers does not know its model_type, and its tokenizer
loader ends in an AttributeError on such a config with yarn unless it may run the checkpoint's own code.
"""

from mla_tools.samples.checkpoint import format_of, write_checkpoint
from mla_tools.samples.model import sample_config, write_sample
from mla_tools.samples.tokenizer import write_tokenizer

__all__ = ["format_of", "sample_config", "write_checkpoint", "write_sample", "write_tokenizer"]
