"""`CLIPTextModel` and `CLIPTextModelWithProjection` over an engine session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import CLIPTextConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from sdopt.model.component import Config, has_projection
from sdopt.pipeline.modules.engine_module import EngineModule, given_inputs
from sdopt.pipeline.prompt import run_in_chunks

if TYPE_CHECKING:
    from sdopt.backends.protocol import Session


class EngineTextEncoder(EngineModule):
    """`CLIPTextModel`, or `CLIPTextModelWithProjection`, over a session.

    `final_norm` is (weight, bias) of the model's last layer norm: with clip_skip, pipelines apply it
    themselves.
    """

    def __init__(self, session: Session, config: Config, final_norm: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.session = session
        self.sessions = (session,)
        self.config = CLIPTextConfig.from_dict(dict(config))
        self.projects = has_projection(config)
        norm = torch.nn.LayerNorm(final_norm[0].shape[0], eps=self.config.layer_norm_eps)
        norm.load_state_dict({"weight": final_norm[0], "bias": final_norm[1]})
        self._final_norm = norm.requires_grad_(False).to(session.device)
        self.text_model = torch.nn.Module()
        self.text_model.final_layer_norm = norm

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | CLIPTextModelOutput | tuple[Any, ...]:
        """Token ids (rows, tokens) to the text's states (rows, tokens, width) and its pooled vector, fp32.

        Several chunks in a row, each with its own start and end, are encoded one by one and joined; the pooled vector
        is that of the first.
        """
        optional = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "output_attentions": output_attentions or None,
        }
        given_inputs(self.session.spec, optional)
        outputs = run_in_chunks(self.session, input_ids)
        last = outputs["last_hidden_state"]
        states = self._hidden_states(outputs) if output_hidden_states else None
        result: BaseModelOutputWithPooling | CLIPTextModelOutput
        if self.projects:
            result = CLIPTextModelOutput(
                text_embeds=outputs["text_embeds"], last_hidden_state=last, hidden_states=states
            )
        else:
            result = BaseModelOutputWithPooling(
                last_hidden_state=last, pooler_output=outputs["pooler_output"], hidden_states=states
            )
        return result.to_tuple() if return_dict is False else result

    def _hidden_states(self, outputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """As transformers counts them: the embeddings, then the output of each layer, none of them
        normalised.

        The engine gives the last layer's only behind the final norm. It is given here standardised, the
        norm's weight and bias taken back: the final norm of it is `last_hidden_state`, as it is of torch's.
        """
        layers = int(self.config.num_hidden_layers)
        norm = self._final_norm
        weight = torch.where(norm.weight == 0, torch.ones_like(norm.weight), norm.weight)
        standardised = (outputs["last_hidden_state"] - norm.bias) / weight
        return (*(outputs[f"hidden_states.{layer}"] for layer in range(layers)), standardised)
