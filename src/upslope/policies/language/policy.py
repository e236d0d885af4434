"""A causal language model as a policy: an action is a token, an observation the tokens up to it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, NoReturn, final

import torch
from torch import Tensor, nn

from upslope.policies.language.architecture import Architecture, UnsupportedArchitectureError
from upslope.policies.language.decoder import Body, Decoder, HuggingFaceBody, causal_model
from upslope.policies.language.distribution import TokenDistribution
from upslope.policies.language.packing import Layout, pack
from upslope.policies.language.sampling import Sampling
from upslope.policies.language.token_head import Head, token_log_prob
from upslope.trajectory import AskedTwice, Evaluation, Observation, Steps, Trajectory

if TYPE_CHECKING:
    from upslope.policies.language.tokenizer import Tokenizer

CHECKED_TOKENS = 12
"""Length of the two random rows on which logits are compared with transformers' when a policy is built."""
TOLERANCE = 1e-4
"""Of that comparison, relative to the largest logit."""


@final
class LanguagePolicy(AskedTwice, nn.Module):
    """A transformers causal language model over rows of tokens [B, T], with a linear critic if wanted; a `Policy`.

    Rows are read up to their last chosen position, without padding, and beginnings that rows share are computed once.
    Dropout is never applied: sampler and learner are one distribution.

    Args:
        model: a transformers causal language model, possibly with LoRA adapters of peft; used as it is, not copied.
        tokenizer: of its vocabulary.
        sampling: how its tokens are drawn: log-probabilities are those of this distribution.
        value_head: whether there is a critic: a linear function of the last hidden state, 0 at first.
        precision: "bfloat16" computes blocks and logits in it (autocast); parameters and sums stay in float32.
        checkpoint_activations: compute activations again in the backward pass instead of keeping them.

    Attributes:
        model, tokenizer, sampling, precision: as given.
        value_head: `nn.Linear(D, 1)` or None.
        architecture: the model's parts, or None where it has none and runs through transformers' own forward pass.
        context: the most positions of a row.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling,
        value_head: bool,
        precision: Literal["float32", "bfloat16"],
        checkpoint_activations: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.precision: Literal["float32", "bfloat16"] = precision
        whole = causal_model(model)
        self.context = int(whole.config.max_position_embeddings)
        weight = whole.get_output_embeddings().weight
        self.value_head: nn.Linear | None = None
        if value_head:
            self.value_head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=weight.dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        model.eval()
        self.architecture: Architecture | None = None
        self._body: Body
        try:
            self.architecture = Architecture.of(model)
            self._body = Decoder(self.architecture, checkpoint_activations=checkpoint_activations)
            difference = self._difference()
        except UnsupportedArchitectureError as error:
            self._use_transformers(str(error), checkpoint_activations)
        else:
            if difference > TOLERANCE:
                self._use_transformers(f"logits differ by {difference:.1e} of the largest", checkpoint_activations)

    def _use_transformers(self, reason: str, checkpoint_activations: bool) -> None:
        """Fall back, and say so."""
        warnings.warn(
            f"{type(causal_model(self.model)).__name__} runs through transformers' own forward pass, with padding and "
            f"slower: {reason}",
            stacklevel=4,
        )
        self.architecture = None
        self._body = HuggingFaceBody(self.model, checkpoint_activations=checkpoint_activations)
        difference = self._difference()
        if difference > TOLERANCE:
            raise UnsupportedArchitectureError(
                f"{type(causal_model(self.model)).__name__} puts something between its last hidden states and its "
                f"logits that is not known here: they differ by {difference:.1e} of the largest"
            )

    @torch.no_grad()
    def _difference(self) -> float:
        """The largest difference from transformers' logits on random rows, relative to the largest logit."""
        whole = causal_model(self.model)
        weight = whole.get_output_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        size = (2, min(CHECKED_TOKENS, self.context))
        tokens = torch.randint(len(weight), size, generator=generator).to(weight.device)
        layout = pack(tokens, torch.full((2,), size[1], device=weight.device), share=False)
        hidden = self._body.hidden(layout, layout.index.flatten())
        logits = whole.get_output_embeddings()(hidden)
        softcap = self._head().softcap
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        theirs = whole(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
        return float((logits - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))

    @property
    def sequential(self) -> bool:
        """Each step depends on all earlier positions of its row."""
        return True

    def train(self, mode: bool = True) -> LanguagePolicy:
        """Training mode, except for the model, whose dropout stays off."""
        super().train(mode)
        self.model.eval()
        return self

    def sampler(self) -> NoReturn:
        """There is none.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a language policy completes prompts and takes no environment steps: use an engine of "
            "upslope.collect.engines"
        )

    def log_prob(self, observation: Observation, action: Tensor) -> Tensor:
        """log pi(a_t | tokens up to t), [..., T], at every position."""
        tokens = _tokens(observation)
        rows = tokens.reshape(-1, tokens.shape[-1])
        distribution, _ = self._read(rows, torch.ones_like(rows, dtype=torch.bool))
        log_prob, _ = token_log_prob(distribution.hidden, action.flatten(), distribution.head)
        return log_prob.view(tokens.shape)

    def evaluate(self, steps: Steps) -> Evaluation:
        """log-prob, entropy, distribution and value at once, differentiable; [B, T], 0 where nothing was chosen."""
        mask = steps.mask
        distribution, value = self._read(_tokens(steps.observation), mask)
        log_prob, entropy = token_log_prob(distribution.hidden, steps.action[mask], distribution.head)
        return Evaluation(
            log_prob=_spread(log_prob, mask),
            entropy=_spread(entropy, mask),
            distribution=distribution,
            value=None if value is None else _spread(value, mask),
        )

    def values(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """V_t and V'_t, both [B, T], at every position up to a row's last chosen one, 0 behind it.

        A row that is cut open is read once more with its final token; what it shares with the row is not computed
        again.

        Raises:
            TypeError: if the policy has no critic.
        """
        if self.value_head is None:
            raise TypeError("this language policy has no critic: build it with value_head=True")
        tokens, final = _tokens(trajectory.observation), _tokens(trajectory.final_observation)
        rows, steps = tokens.shape
        row, after = trajectory.final_index // steps, trajectory.final_index % steps + 1
        longer = torch.cat([tokens, tokens[:, -1:]], dim=1)
        closed = longer[row].scatter(1, after.unsqueeze(-1), final.unsqueeze(-1))
        length = torch.cat([_length(trajectory.mask), after + 1])
        layout = self._pack(torch.cat([longer, closed]), length)
        inside = torch.arange(layout.index.shape[1], device=tokens.device) < length.unsqueeze(-1)
        every = torch.arange(len(layout.token), device=tokens.device)
        value = self._value(self._hidden(layout, every))
        table = value.new_zeros(len(length), steps + 1)
        table[:, : inside.shape[1]] = value[layout.index] * inside
        present = table[:rows, :steps]
        return present, trajectory.next_value(present, table[rows:].gather(1, after.unsqueeze(-1)).squeeze(-1))

    def _read(self, tokens: Tensor, mask: Tensor) -> tuple[TokenDistribution, Tensor | None]:
        """Distributions and values [M] at the chosen positions."""
        layout = self._pack(tokens, _length(mask))
        chosen = layout.index[mask[:, : layout.index.shape[1]]]
        hidden = self._hidden(layout, chosen)
        value = None if self.value_head is None else self._value(hidden)
        return TokenDistribution(hidden=hidden, head=self._head(), mask=mask), value

    def _pack(self, tokens: Tensor, length: Tensor) -> Layout:
        longest = int(length.max())
        if longest > self.context:
            raise ValueError(
                f"a row has {longest} tokens and the model reads at most {self.context}: shorten prompts or completions"
            )
        return pack(tokens, length, share=self.architecture is not None)

    def _hidden(self, layout: Layout, wanted: Tensor) -> Tensor:
        if self.precision == "float32":
            return self._body.hidden(layout, wanted)
        with torch.autocast(layout.token.device.type, dtype=torch.bfloat16):
            hidden = self._body.hidden(layout, wanted)
        return hidden.float()

    def _head(self) -> Head:
        whole = causal_model(self.model)
        output: Any = whole.get_output_embeddings()
        softcap = None
        if self.architecture is not None:
            softcap = self.architecture.logit_softcap
        elif "final_logit_softcapping" in whole.config.to_dict():
            softcap = whole.config.final_logit_softcapping
        return Head(
            weight=output.weight,
            bias=output.bias,
            softcap=softcap,
            sampling=self.sampling,
            dtype=torch.bfloat16 if self.precision == "bfloat16" else output.weight.dtype,
        )

    def _value(self, hidden: Tensor) -> Tensor:
        assert self.value_head is not None
        return self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1)


def _tokens(observation: Observation) -> Tensor:
    if not isinstance(observation, Tensor):
        raise TypeError(f"a language policy observes one tensor of tokens, got named ones: {', '.join(observation)}")
    return observation


def _length(mask: Tensor) -> Tensor:
    """[B] tokens up to the last chosen position of each row."""
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (steps * mask).amax(dim=1)


def _spread(chosen: Tensor, mask: Tensor) -> Tensor:
    """[B, T] from what stands at chosen positions; 0 elsewhere."""
    return chosen.new_zeros(mask.shape).masked_scatter(mask, chosen)
