"""smoltolk: text-speech language models with late fusion and multi-level fission."""

from .model.checkpoints import import_checkpoint
from .model.configuration_smoltolk import SmolTolkConfig
from .model.modeling_smoltolk import SmolTolkForCausalLM, SmolTolkOutput

__all__ = ["SmolTolkConfig", "SmolTolkForCausalLM", "SmolTolkOutput", "import_checkpoint"]
__version__ = "0.1.0"
