"""Small ragged batches for tests of models."""

from collections.abc import Sequence

import torch

from hashtab.models.ctr import FeatureSpec, TensorBatch
from hashtab.models.ctr.batch import Feature

N_ITEMS = 12

_OBJECT = (
    Feature(name="item", kind="categorical", size=N_ITEMS),
    Feature(name="price", kind="numeric", size=1),
)
SPEC = FeatureSpec(
    behaviour=_OBJECT,
    candidate=_OBJECT,
    context=(Feature(name="hour", kind="categorical", size=5),),
    counters=("item",),
)


def batch_of(history: Sequence[int], cuts: Sequence[int], candidates: Sequence[int]) -> TensorBatch:
    """Return one user with this history and one sample for each cut."""
    items, scored = torch.tensor(history, dtype=torch.int32), torch.tensor(candidates)
    return TensorBatch(
        history_offsets=torch.tensor([0, len(history)]),
        behaviours={"item": items, "price": items / N_ITEMS},
        sample_offsets=torch.tensor([0, len(cuts)]),
        cuts=torch.tensor(cuts),
        candidates={"item": scored.int(), "price": scored / N_ITEMS},
        context={"hour": (scored % 3 + 2).int()},
        counters=scored[:, None] / N_ITEMS,
        labels=(scored % 2).float(),
    )


def random_user(seed: int, n_behaviours: int) -> TensorBatch:
    """Return a user whose last sample sees two thirds of the history (all of a short one)."""
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(2, N_ITEMS, (n_behaviours,), generator=generator).tolist()
    most = n_behaviours if n_behaviours < 10 else 2 * n_behaviours // 3
    cuts = [*sorted(torch.randint(0, most + 1, (4,), generator=generator).tolist()), most]
    candidates = torch.randint(2, N_ITEMS, (5,), generator=generator).tolist()
    return batch_of(history, cuts, candidates)


def concatenate(users: Sequence[TensorBatch]) -> TensorBatch:
    """Return one batch of all users."""

    def offsets(name: str) -> torch.Tensor:
        lengths = torch.cat([getattr(user, name).diff() for user in users])
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))

    def columns(name: str) -> dict[str, torch.Tensor]:
        keys = getattr(users[0], name)
        return {key: torch.cat([getattr(user, name)[key] for user in users]) for key in keys}

    return TensorBatch(
        history_offsets=offsets("history_offsets"),
        behaviours=columns("behaviours"),
        sample_offsets=offsets("sample_offsets"),
        cuts=torch.cat([user.cuts for user in users]),
        candidates=columns("candidates"),
        context=columns("context"),
        counters=torch.cat([user.counters for user in users]),
        labels=torch.cat([user.labels for user in users]),
    )


def samples_alone(user: TensorBatch) -> list[TensorBatch]:
    """Return each sample of one user as a batch of its own, whose history ends at its cut."""
    return [
        TensorBatch(
            history_offsets=torch.tensor([0, cut]),
            behaviours={name: column[:cut] for name, column in user.behaviours.items()},
            sample_offsets=torch.tensor([0, 1]),
            cuts=torch.tensor([cut]),
            candidates={name: column[i : i + 1] for name, column in user.candidates.items()},
            context={name: column[i : i + 1] for name, column in user.context.items()},
            counters=user.counters[i : i + 1],
            labels=user.labels[i : i + 1],
        )
        for i, cut in enumerate(user.cuts.tolist())
    ]
