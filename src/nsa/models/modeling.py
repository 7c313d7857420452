"""The model in transformers' conventions: ``NSAModel`` and, with a head, ``NSAForCausalLM``."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils.generic import can_return_tuple

from nsa.layers import Compressor, DenseAttention, NativeSparseAttention
from nsa.models.batching import (
    Layout,
    check_positions,
    packed_layout,
    padded_layout,
)
from nsa.models.configuration import NSAModelConfig
from nsa.models.hf_cache import NSACacheLayer, nsa_layers
from nsa.models.inputs import (
    EMPTY_ROW,
    check_embeds,
    check_extras,
    check_ids,
    check_labels,
    packing,
)
from nsa.models.rotary import RotaryEmbedding


def _attention(config: NSAModelConfig) -> NativeSparseAttention | DenseAttention:
    assert config.head_dim is not None, "filled in by the config"
    assert config.num_key_value_heads is not None, "filled in by the config"
    sizes = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.v_head_dim,
    )
    qk_norm_eps = config.rms_norm_eps if config.qk_norm else None
    if config.attention == "dense":
        return DenseAttention(*sizes, qk_norm_eps=qk_norm_eps, bias=config.attention_bias)
    return NativeSparseAttention(
        *sizes,
        config=config.geometry,
        compressor=config.compressor,
        kv_per_branch=config.kv_per_branch,
        qk_norm_eps=qk_norm_eps,
        bias=config.attention_bias,
    )


class NSADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: NSAModelConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.geometry = config.geometry
        self.self_attn = _attention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        layout: Layout,
        rotary: partial[tuple[Tensor, Tensor]],
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """``[batch, seq, hidden_size]`` to the same."""
        x = self.input_layernorm(hidden_states)
        if isinstance(self.self_attn, DenseAttention):
            update = past_key_values and partial(past_key_values.update, layer_idx=self.layer_idx)
            attended = self.self_attn(
                x,
                cos,
                sin,
                cu_seqlens=layout.cu_seqlens,
                lengths=layout.lengths,
                mask=layout.mask,
                update=update,
            )
        else:
            cache = None
            if past_key_values is not None:
                layer = past_key_values.layers[self.layer_idx]
                assert isinstance(layer, NSACacheLayer), "checked at the model's entry"
                cache = layer.open(self.geometry)
            attended = self.self_attn(
                x,
                cos,
                sin,
                cu_seqlens=layout.cu_seqlens,
                max_seqlen=layout.longest if layout.cu_seqlens is not None else None,
                cache=cache,
                rotary=rotary,
                counts=layout.counts,
            )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class NSAPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: NSAModelConfig
    config_class = NSAModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NSADecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # Attention belongs to the model. Of transformers' implementations, "sdpa" is the neutral name:
    # "eager" promises attention matrices, and names with "flash" or "flex" need their packages.
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _supports_context_parallel = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Compressor):
            for name, value in module.initial_weights().items():
                initialization.copy_(module.get_parameter(name), value)
        elif isinstance(module, RotaryEmbedding):
            initialization.copy_(module.inv_freq, module.frequencies()[0])


class NSAModel(NSAPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: NSAModelConfig):
        super().__init__(config)
        if config._attn_implementation != "sdpa":
            raise ValueError(
                "attn_implementation: expected 'sdpa' or none, since attention belongs to this "
                f"model, got {config._attn_implementation!r}. Choose it with config.attention, "
                "'nsa' or 'dense'."
            )
        config.validate()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            NSADecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token; see ``NSAForCausalLM.forward`` for the arguments."""
        check_extras(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them.")
        if input_ids is not None:
            check_ids("input_ids", input_ids, self.embed_tokens.num_embeddings)
        if inputs_embeds is not None:
            check_embeds(inputs_embeds, self.config.hidden_size)
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cu_seqlens = packing(cu_seqlens, kwargs, position_ids, attention_mask, past_key_values)
        cache = self._open_cache(past_key_values, use_cache, cu_seqlens)
        layout = self._lay_out(hidden, attention_mask, position_ids, cache, cu_seqlens)
        if past_key_values is None and 0 in (layout.counts or ()):
            raise ValueError(EMPTY_ROW)
        rotary = partial(self.rotary_emb, dtype=hidden.dtype)
        cos, sin = rotary(layout.positions)
        hidden = layout.roll(hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(layout.roll_back(hidden))
            hidden = layer(hidden, cos, sin, layout=layout, rotary=rotary, past_key_values=cache)
        hidden = layout.roll_back(self.norm(hidden))
        for layer in cache.layers if cache is not None else ():
            if isinstance(layer, NSACacheLayer):
                layer.num_columns += hidden.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,  # pyright: ignore[reportArgumentType]
            past_key_values=cache,
            hidden_states=(*states, hidden) if output_hidden_states else None,
        )

    def _open_cache(
        self, cache: Cache | None, use_cache: bool | None, cu_seqlens: Tensor | None
    ) -> Cache | None:
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seqlens is None
        if cache is None and not use_cache:
            return None
        if cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens: expected no cache with packed sequences. Pass use_cache=False and no "
                "past_key_values, or one sequence per row."
            )
        if self.training and self.gradient_checkpointing:
            raise ValueError(
                "use_cache: expected False with gradient checkpointing, which would fill the cache "
                "twice. Pass use_cache=False and no past_key_values."
            )
        if cache is None:
            cache = DynamicCache(config=self.config)
        elif not isinstance(cache, Cache) or cache.is_compileable:
            raise ValueError(
                "past_key_values: expected a DynamicCache, which grows as needed, got a "
                f"{type(cache).__name__}. Leave past_key_values and cache_implementation out, or "
                "make it with transformers.DynamicCache(config=model.config)."
            )
        if self.config.attention == "nsa":
            nsa_layers(cache, self.config.num_hidden_layers)
        return cache

    def _lay_out(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None,
    ) -> Layout:
        batch, seq = hidden.shape[:2]
        rolls = self.config.attention == "nsa"
        if batch == 0 or seq == 0:
            raise ValueError(f"input_ids: expected at least one token, got {[batch, seq]}.")
        if cu_seqlens is not None and attention_mask is not None:
            raise ValueError("attention_mask: expected None with cu_seqlens, got both.")
        if cu_seqlens is not None:
            layout = packed_layout(cu_seqlens.to(hidden.device), batch, seq, rolls=rolls)
        else:
            first = cache.layers[0] if cache is not None and cache.layers else None
            storage = first.storage if isinstance(first, NSACacheLayer) else None
            layout = padded_layout(
                (batch, seq),
                attention_mask,
                past=storage.seq_lens if storage is not None else [],
                past_columns=0 if cache is None else cache.get_seq_length(),
                device=hidden.device,
                rolls=rolls,
            )
        if not torch.compiler.is_compiling():
            limit = self.config.max_position_embeddings
            if layout.longest > limit:
                raise ValueError(
                    f"input_ids: expected sequences of at most {limit} tokens "
                    f"(max_position_embeddings), got {layout.longest}. Shorten the text, or set "
                    "rope_parameters with a scaling type such as yarn and raise "
                    "max_position_embeddings."
                )
            if position_ids is not None:
                check_positions(position_ids, layout, attention_mask)
        return layout


class NSAForCausalLM(NSAPreTrainedModel, GenerationMixin):
    """Language model with Native Sparse Attention, or its dense twin (``config.attention``).

    ``NSAForCausalLM.from_pretrained(folder)`` loads one. ``AutoModelForCausalLM`` does too once
    ``nsa.models`` is imported; ``import nsa`` alone loads no transformers.

    Example:
        >>> config = NSAModelConfig(vocab_size=100, hidden_size=64, num_attention_heads=4)
        >>> ids = torch.randint(100, (1, 50))
        >>> NSAForCausalLM(config)(input_ids=ids, labels=ids).logits.shape
        torch.Size([1, 50, 100])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NSAModelConfig):
        super().__init__(config)
        self.model = NSAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            # Trainer warns of weights that a checkpoint lacks, but for these.
            self._keys_to_ignore_on_save = list(self._tied_weights_keys)
        self.post_init()

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask.any(-1).all()):
            raise ValueError(EMPTY_ROW)
        kind = generation_config.cache_implementation
        if self.config.attention == "nsa" and kind not in (None, "dynamic", "dynamic_full"):
            raise ValueError(
                f"cache_implementation: expected None, which grows as needed, got {kind!r}. Other "
                "kinds hold no compressed keys; leave it out."
            )
        prepare = super()._prepare_cache_for_generation  # pyright: ignore[reportAttributeAccessIssue]
        return prepare(generation_config, model_kwargs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Where ``generate_batch`` begins: its paged cache has no place for compressed keys."""
        raise NotImplementedError(
            "generate_batch: continuous batching is not supported. Call generate, with the prompts "
            "padded on the left."
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss of the next tokens.

        Args:
            input_ids: int64 ``[batch, seq]``; ``[1, tokens]`` when packed.
            attention_mask: ``[batch, seq]`` (cached columns before it), 1 at real tokens. Padding
                may be on either side; only on the left to generate.
            position_ids: positions that restart at 0 in ``[1, tokens]`` mean packed sequences, as
                ``transformers.DataCollatorWithFlattening`` writes them. Otherwise they must be the
                tokens' own, since blocks are counted from the start of a sequence.
            past_key_values: a ``DynamicCache``, made here if ``use_cache`` and none is given.
            inputs_embeds: ``[batch, seq, hidden_size]`` instead of ``input_ids``.
            labels: int64 like ``input_ids``, -100 where there is no loss. Shifted here, within
                sequences: the last token of one never predicts the first of the next. The mean
                over no token at all is NaN, as in transformers; ``num_items_in_batch`` makes it 0.
            use_cache: ``config.use_cache`` if None, but never in training or with labels.
            cu_seqlens: int32 ``[num_seqs + 1]``, where packed sequences begin and end; also
                accepted as ``cu_seq_lens_q``.
            logits_to_keep: the number of last positions, or their indices; all if 0.
            kwargs: ``num_items_in_batch``, ``output_hidden_states``, ``return_dict``.

        Raises:
            ValueError: bad input; the message names the argument.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("logits_to_keep: expected 0 with labels, whose loss needs all logits.")
        if labels is not None:
            given = input_ids if inputs_embeds is None else inputs_embeds
            check_labels(labels, given, self.config.vocab_size)
            use_cache = bool(use_cache)
        cu_seqlens = packing(cu_seqlens, kwargs, position_ids, attention_mask, past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=_next_tokens(labels, cu_seqlens),
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


def _next_tokens(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Labels moved one token to the left, -100 at the last token of every sequence."""
    shifted = pad(labels.long(), (0, 1), value=-100)[..., 1:].contiguous()
    if cu_seqlens is None:
        return shifted
    token = torch.arange(labels.shape[-1] + 1, device=labels.device)
    sequence = torch.searchsorted(cu_seqlens.to(labels.device), token, right=True)
    return shifted.masked_fill(sequence[1:] != sequence[:-1], -100)
