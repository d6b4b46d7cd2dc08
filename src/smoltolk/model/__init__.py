"""The SmolTolk model: configuration, architecture, and import of the authors' checkpoints."""

from transformers import AutoConfig, AutoModelForCausalLM

from .configuration_smoltolk import SmolTolkConfig
from .modeling_smoltolk import SmolTolkForCausalLM

AutoConfig.register(SmolTolkConfig.model_type, SmolTolkConfig)
AutoModelForCausalLM.register(SmolTolkConfig, SmolTolkForCausalLM)
