"""What is added to every token's loss: KL to the reference, the entropy bonus. A term is one row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from grpo.algorithm.inputs import LossInputs, bounded, k3
from grpo.algorithm.needs import Needs
from grpo.config import Algorithm


@dataclass(frozen=True, slots=True)
class Term:
    """Something that is added to every token's loss, times a coefficient; one that the configuration has 0 is not."""

    coefficient: Callable[[Algorithm, LossInputs | None], float]
    """By the configuration; with inputs, which a controller may have given another, as it is now."""
    value: Callable[[LossInputs], torch.Tensor]
    needs: Needs
    statistic: str | None = None
    """Name under which its mean is reported; None: something else reports it."""


def _log_ratio(inputs: LossInputs) -> torch.Tensor:
    assert inputs.reference_logprobs_C is not None, "the KL term needs the reference's logprobs"
    return inputs.logprobs_C - inputs.reference_logprobs_C


def kl_k2(inputs: LossInputs) -> torch.Tensor:
    """x^2 / 2, x = log policy - log reference: on-policy, its gradient is that of the reverse KL (arXiv:2510.01555)."""
    return bounded(_log_ratio(inputs)).square() / 2.0


def kl_k3(inputs: LossInputs) -> torch.Tensor:
    """k3 estimate of KL(policy || reference) of each token (GRPO, arXiv:2402.03300, eq. 4)."""
    return k3(_log_ratio(inputs))


def kl_k3_ratio(inputs: LossInputs) -> torch.Tensor:
    """k3 times the token's ratio, through which it has a gradient too: unbiased off-policy (arXiv:2512.02556)."""
    return bounded(inputs.log_ratio_C).exp() * kl_k3(inputs)


def entropy(inputs: LossInputs) -> torch.Tensor:
    """Entropy of the policy at each token."""
    assert inputs.entropy_C is not None, "the entropy bonus needs the entropy"
    return inputs.entropy_C


def _kl_term(name: str, value: Callable[[LossInputs], torch.Tensor]) -> Term:
    def coefficient(algorithm: Algorithm, inputs: LossInputs | None) -> float:
        if algorithm.kl != name or not algorithm.kl_coef:
            return 0.0
        moved = inputs.kl_coef if inputs else None
        return algorithm.kl_coef if moved is None else moved

    return Term(coefficient, value, Needs(reference=True, zero_advantage_rows=True))


TERMS: tuple[Term, ...] = (
    _kl_term("k2", kl_k2),
    _kl_term("k3", kl_k3),
    _kl_term("k3_ratio", kl_k3_ratio),
    Term(lambda algorithm, _: -algorithm.entropy_coef, entropy, Needs(entropy_gradient=True, zero_advantage_rows=True)),
)
"""In the order in which they are added."""


def active_terms(algorithm: Algorithm) -> Iterator[Term]:
    """Those with a coefficient that is not 0."""
    return (term for term in TERMS if term.coefficient(algorithm, None) != 0.0)


def attached(term: Term, inputs: LossInputs) -> torch.Tensor:
    """A term's value. Raises AssertionError if it would be a constant while the logprobs have a gradient."""
    value_C = term.value(inputs)
    if inputs.logprobs_C.requires_grad and not value_C.requires_grad:
        raise AssertionError(
            f"a term of the loss must have a gradient, but that of {term.value.__name__} is detached and would teach "
            "nothing; declare in its Needs what it needs and compute it from inputs that carry a gradient"
        )
    return value_C
