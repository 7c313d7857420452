"""Hugging Face config and model, and conversion of dense checkpoints.

Importing this package registers the model with transformers' ``AutoConfig``, ``AutoModel`` and
``AutoModelForCausalLM``; ``import nsa`` alone does not, since it leaves transformers unloaded.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from nsa.models.configuration import NSAModelConfig
from nsa.models.conversion import convert_from_dense
from nsa.models.hf_cache import NSACacheLayer
from nsa.models.loading import load_model
from nsa.models.modeling import NSAForCausalLM, NSAModel, NSAPreTrainedModel

AutoConfig.register(NSAModelConfig.model_type, NSAModelConfig, exist_ok=True)
AutoModel.register(NSAModelConfig, NSAModel, exist_ok=True)
AutoModelForCausalLM.register(NSAModelConfig, NSAForCausalLM, exist_ok=True)

__all__ = [
    "NSACacheLayer",
    "NSAForCausalLM",
    "NSAModel",
    "NSAModelConfig",
    "NSAPreTrainedModel",
    "convert_from_dense",
    "load_model",
]
