"""smoltolk: text-speech language models with late fusion and multi-level fission."""

from typing import TYPE_CHECKING, Any

from .model.checkpoints import import_checkpoint
from .model.configuration_smoltolk import SmolTolkConfig
from .model.export import export_model
from .model.modeling_smoltolk import SmolTolkForCausalLM, SmolTolkOutput

__all__ = [
    "SmolTolkConfig",
    "SmolTolkForCausalLM",
    "SmolTolkOutput",
    "SmolTolkPipeline",
    "export_model",
    "import_checkpoint",
]
__version__ = "0.1.0"

if TYPE_CHECKING:
    from .generation.pipeline import SmolTolkPipeline


def __getattr__(name: str) -> Any:
    """Loads the pipeline, and the audio libraries with it, when it is first asked for."""
    if name == "SmolTolkPipeline":
        from .generation.pipeline import SmolTolkPipeline

        return SmolTolkPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
