"""A trained dictionary on disk and in memory: reading codes, making changes, saving and loading."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunediff import dictionaries
from tunediff.core import artifacts, manifests, variants
from tunediff.core.errors import ArtifactError
from tunediff.dictionaries.architectures.base import Dictionary, Spec
from tunediff.dictionaries.sources import Normalization
from tunediff.kernels import gates
from tunediff.records.change import Change
from tunediff.records.site import Site

SCHEMA = "tunediff.dictionary/1"
"""Schema of a fitted dictionary's manifest."""


@dataclass(frozen=True)
class Quality:
    """How well a dictionary reconstructs held-out tokens at inference thresholds; sums are in float64.

    ev_base, ev_tuned   share of variance explained: 1 is perfect, 0 no better than the mean, below 0 worse; nan if the
                        dictionary reconstructs the difference alone. Where it reads tuned alone, base is explained
                        with `base_writes`
    ev_delta            explained share of the variance of tuned - base; a low value means that the change was missed
    l0_training         mean latents on a token under the training gates, on the calibration tokens
    l0_inference        mean latents on a token at inference thresholds
    l0_gap              l0_inference / l0_training - 1; comparisons are not valid beyond 0.05 either way
    dead_share          share of latents that were dead at the last step
    silent_share        share of latents that fire on no held-out token
    train_tokens        training tokens, repeats counted
    held_out_tokens     held-out tokens
    log_rms_ratio       log(rms tuned / rms base) at each site
    delta_ratio         rms of the centered difference, in units of the streams' rms
    """

    ev_base: float
    ev_tuned: float
    ev_delta: float
    l0_training: float
    l0_inference: float
    l0_gap: float
    dead_share: float
    silent_share: float
    train_tokens: int
    held_out_tokens: int
    log_rms_ratio: tuple[float, ...]
    delta_ratio: float

    @property
    def comparable(self) -> bool:
        """Whether L0 at inference is within 5 % of L0 in training."""
        return abs(self.l0_gap) <= 0.05


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained dictionary, ready to read raw activations.

    dictionary      parameters, in normalized units
    normalization   from raw to normalized units and back
    thresholds      threshold of each gate group, on the scaled code f*w; 0 keeps every positive code
    sites           the sites along axis S
    quality         measures on held-out tokens
    curve           rows of the training curve, each a dict from column to number
    firings_F       number of held-out tokens on which each latent fires
    seed            seed of the fit
    source          fingerprint of the source it was fitted to
    """

    dictionary: Dictionary
    normalization: Normalization
    thresholds: dict[str, float]
    sites: tuple[Site, ...]
    quality: Quality
    curve: list[dict[str, float]]
    firings_F: Tensor
    seed: int
    source: str

    @cached_property
    def threshold_F(self) -> Tensor:
        """Each latent's threshold on its own code f: the group's threshold / w_j."""
        return thresholds_of(self.dictionary, self.thresholds)

    @torch.no_grad()
    def codes(self, x_NSMD: Tensor) -> Tensor:
        """Return the codes f_NF of raw activations, at inference thresholds."""
        return gates.threshold_gate(self.dictionary.pre(self.normalization.apply(x_NSMD.float())), self.threshold_F)

    @torch.no_grad()
    def reconstruct(self, x_NSMD: Tensor) -> Tensor:
        """Return xhat_NSMD in raw units: sum_j f_j * write_j + offset."""
        return self.normalization.undo(self.dictionary.decode(self.codes(x_NSMD)))

    @property
    def offset_SMD(self) -> Tensor:
        """The reconstruction where no latent is on, in raw units: center + decoder bias * scale."""
        return self.normalization.undo(self.dictionary.bias_SMD().detach()[None])[0]

    @torch.no_grad()
    def change(self, latent: int, *, id: str, finder: str) -> Change:
        """Return one latent as a `Change` in raw units: its strength is the code, its write the decoder times scale."""
        scale = self.normalization.scale_S[:, None, None]
        own = slice(latent, latent + 1)
        rows_SMD = self.dictionary.read_FSMD(own)[0] / scale
        bias = float(self.dictionary.encoder_bias_F[latent]) - float(
            (rows_SMD.double() * self.normalization.center_SMD.double()).sum()
        )
        share = float(self.dictionary.share_F()[latent])
        group = next(g for g in self.dictionary.groups() if g.start <= latent < g.stop)
        return Change(
            id=id,
            sites=self.sites,
            rows_SMD=rows_SMD.clone(),
            write_SMD=self.dictionary.write_FSMD(own)[0] * scale,
            bias=bias,
            threshold=float(self.threshold_F[latent]),
            finder=finder,
            origin={
                "latent": latent,
                "dictionary": self.dictionary.spec.variant,
                "group": group.form_of(latent),
                "share": share,
                "held_out_firings": int(self.firings_F[latent]),
                "held_out_tokens": self.quality.held_out_tokens,
                "seed": self.seed,
            },
        )

    def save(self, folder: Path) -> None:
        """Write ``dictionary.safetensors``, ``curve.json`` and, last, the manifest."""
        manifests.finish(folder, SCHEMA, self.body, self.write(folder))

    @property
    def body(self) -> dict[str, Any]:
        """What the manifest says of the dictionary."""
        return {
            "variant": self.dictionary.spec.variant,
            "spec": self.dictionary.spec,
            "seed": self.seed,
            "sites": [str(site) for site in self.sites],
            "source": self.source,
            "thresholds": self.thresholds,
            "delta_variance": self.normalization.delta_variance,
            "quality": self.quality,
        }

    def write(self, folder: Path) -> list[str]:
        """Write the dictionary's files without a manifest, and return their names."""
        norm = self.normalization
        artifacts.write_tensors(
            folder / "dictionary.safetensors",
            {
                **self.dictionary.state_dict(),
                "firings_F": self.firings_F,
                "center_SMD": norm.center_SMD,
                "scale_S": norm.scale_S,
                "log_rms_ratio_S": norm.log_rms_ratio_S,
            },
        )
        artifacts.write_json(folder / "curve.json", self.curve)
        return ["dictionary.safetensors", "curve.json"]

    @classmethod
    def load(cls, folder: Path, variant: str | None = None) -> Fitted:
        """Read what `save` wrote; `variant` is the import path of an out-of-tree dictionary.

        Raises ArtifactError if the folder is unfinished, damaged or of another schema, or if it names an import path
        other than `variant`: a folder from elsewhere must not decide which code runs.
        """
        folder = Path(folder)
        manifest = manifests.open_folder(folder, SCHEMA)
        if variants.is_import_path(manifest["variant"]) and manifest["variant"] != variant:
            raise ArtifactError(
                f"{folder} names code to be imported",
                expected=variant or "a dictionary of this package",
                got=str(manifest["variant"]),
                remedy=f"if you trust that code, Fitted.load(folder, variant={manifest['variant']!r})",
            )
        tensors = artifacts.read_tensors(folder / "dictionary.safetensors")
        spec = dictionaries.spec(manifest["variant"], **manifest["spec"])
        sites = tuple(Site.parse(text) for text in manifest["sites"])
        norm = Normalization(
            center_SMD=tensors.pop("center_SMD"),
            scale_S=tensors.pop("scale_S"),
            log_rms_ratio_S=tensors.pop("log_rms_ratio_S"),
            delta_variance=manifest["delta_variance"],
        )
        firings_F = tensors.pop("firings_F")
        dictionary = build(spec, sites=len(sites), width=norm.center_SMD.shape[2], seed=manifest["seed"])
        dictionary.load_state_dict(tensors)
        return cls(
            dictionary=dictionary.requires_grad_(False),
            normalization=norm,
            # JSON stores infinity, the threshold of a gate that never opens, as null.
            thresholds={k: float("inf") if v is None else v for k, v in manifest["thresholds"].items()},
            sites=sites,
            quality=Quality(**{name: _restored(value) for name, value in manifest["quality"].items()}),
            curve=[
                {name: _restored(value) for name, value in row.items()}
                for row in artifacts.read_json(folder / "curve.json")
            ],
            firings_F=firings_F,
            seed=manifest["seed"],
            source=manifest["source"],
        )


def _restored(value: Any) -> Any:
    """Convert a value read from JSON back: null to nan, lists to tuples."""
    if isinstance(value, list):
        return tuple(map(_restored, value))
    return float("nan") if value is None else value


def build(spec: Spec, *, sites: int, width: int, seed: int) -> Dictionary:
    """Return the untrained dictionary that `spec` names."""
    dictionary: Dictionary = variants.load(dictionaries.PACKAGE, spec.variant)(
        spec, sites=sites, width=width, seed=seed
    )
    return dictionary


def thresholds_of(dictionary: Dictionary, thresholds: dict[str, float]) -> Tensor:
    """Return thresholds (F,) on the code f, from each gate group's threshold on the scaled code f*w."""
    weight_F = dictionary.scales_F()
    out_F = torch.zeros_like(weight_F)
    for group in dictionary.groups():
        theta = thresholds[group.name]
        part = weight_F[group.start : group.stop]
        out_F[group.start : group.stop] = (
            torch.where(part > 0, theta / part, torch.full_like(part, float("inf"))) if theta else 0.0
        )
    return out_F
