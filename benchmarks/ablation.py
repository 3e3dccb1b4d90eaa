"""Ablation: from the baseline paper's way of training to this project's, one change a variant."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    name: str
    loader: str
    """`report`: the baseline paper's own DataLoader; else a loader of this project."""
    waits: bool = False
    """Whether the loss is read after every step, as the baseline paper's loop does, which waits for the device."""
    channels_last: bool = False
    autocast: bool = False
    compiled: bool = False
    fused: bool = False

    def with_loader(self, loader: str) -> "Variant":
        """Return the same way with other batches."""
        return replace(self, name=loader, loader=loader)


def _variants() -> tuple[Variant, ...]:
    variants = [Variant("the baseline paper's way, float32", "report", waits=True)]
    for name, change in (
        ("no wait for the loss", {"waits": False}),
        ("channels-last", {"channels_last": True}),
        ("autocast", {"autocast": True}),
        ("fused optimizer", {"fused": True}),
        ("gray bytes by dali", {"loader": "dali"}),
        ("resident", {"loader": "resident"}),
        # Last, since --compile auto leaves it out on a CPU.
        ("compiled", {"compiled": True}),
    ):
        variants.append(replace(variants[-1], name=name, **change))
    return tuple(variants)


VARIANTS = _variants()
