"""What can be asked of a fit."""

from __future__ import annotations

from dataclasses import dataclass

from retrieval.errors import DataError
from retrieval.heads.modalities import IMAGE, TEXT
from retrieval.heads.networks import Network
from retrieval.heads.problem import TREATMENTS, Treatment
from retrieval.heads.scores import DRAWS
from retrieval.heads.targets import LABEL
from retrieval.heads.variants import FUSED

BALANCES = ("none", "ogm-ge")


@dataclass(frozen=True)
class ClassifySettings:
    """What to fit.

    Attributes:
        target: the column to predict.
        task: class, labels, number, or auto.
        columns: further modalities.
        variants: names of :data:`retrieval.heads.variants.FUSED`; empty: all of them.
        imbalance: the treatment of rare classes.
        balance: of modalities: none, or ogm-ge.
        study: compare all treatments on one network.
        folds: of cross-validation; 0: the split given.
        pixels: measure a small CNN on the pixels beside the models of the image's vector.
        views: further views of each picture to learn from (flipped, rotated, cropped, coloured), embedded once.
        explain: what each modality contributed on test.
        draws: of the bootstrap.
        seed: of every random number.
        device: of what is trained by gradients.
        finetune: how many of each tower's last blocks learn with the network; 0: none.
        start: the fusion network to fine-tune; empty: the one chosen, or where that is none the best on val.
    """

    target: str = LABEL
    task: str = "auto"
    columns: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    imbalance: Treatment = "class-weights"
    balance: str = "none"
    study: bool = True
    folds: int = 0
    pixels: bool = True
    views: int = 0
    explain: bool = False
    draws: int = DRAWS
    seed: int = 0
    device: str = "cpu"
    finetune: int = 0
    start: str = ""

    def check(self) -> None:
        """Refuse what is not known, before anything is read: DataError."""
        for names, known, what in (
            (self.variants, FUSED, "variant"),
            ((self.imbalance,), TREATMENTS, "treatment of imbalance"),
            ((self.balance,), BALANCES, "balance of modalities"),
        ):
            if unknown := [name for name in names if name not in known]:
                raise DataError(f"there is no {what} {unknown[0]!r}: there are {', '.join(known)}")
        if self.folds == 1 or self.folds < 0:
            raise DataError("cross-validation needs at least 2 folds; 0 is the split given")
        if self.draws < 1:
            raise DataError("the intervals need at least one draw of the bootstrap")
        if reserved := [name for name in self.columns if name in (IMAGE, TEXT, self.target, *FUSED)]:
            raise DataError(
                f"{reserved[0]!r} cannot be a further column: it is what is predicted, or the name of something else"
            )
        if len(set(self.columns)) < len(self.columns):
            raise DataError("a column is named twice")
        if self.imbalance == "augment" and not self.views:
            raise DataError("augmented views are made with --views: how many of each picture")
        self._check_finetuning()

    def _check_finetuning(self) -> None:
        networks = [name for name, spec in FUSED.items() if isinstance(spec, Network)]
        fitted = [name for name in networks if not self.variants or name in self.variants]
        if self.finetune and self.folds:
            raise DataError("towers are fine-tuned on the split given: leave out --finetune, or --folds")
        if self.start and not self.finetune:
            raise DataError("a network to begin with is for fine-tuning: add --finetune")
        if self.start and self.start not in fitted:
            raise DataError(f"{self.start!r} cannot be fine-tuned: fitted networks are {', '.join(fitted) or 'none'}")
        if self.finetune and not fitted:
            raise DataError(f"no network is among the variants, to be fine-tuned: networks are {', '.join(networks)}")
