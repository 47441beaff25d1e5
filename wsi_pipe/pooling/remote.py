"""Slide encoders whose makers ship the code: loaded by transformers, and only where the user says so."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wsi_pipe.errors import ConfigError, WeightsError
from wsi_pipe.pooling.known import SlideEncoder

__all__ = ["RemoteEncoder"]


class RemoteEncoder:
    """A slide encoder that runs its makers' code, at the revision that is stated.

    Raises ConfigError without ``trust``, ImportError without transformers, WeightsError where it cannot be loaded.
    """

    def __init__(self, spec: SlideEncoder, *, trust: bool, device: str = "cpu") -> None:
        if not trust:
            raise ConfigError(
                f"slide encoder {spec.name} is computed by code that its makers ship at "
                f"https://huggingface.co/{spec.hub_id} (revision {spec.revision[:12]}), which runs with your rights",
                remedy="read that code, then say --trust-remote-code; or take a slide encoder that is built here",
            )
        import transformers

        self.spec = spec
        self._device = device
        try:
            model: Any = transformers.AutoModel.from_pretrained(
                spec.hub_id, revision=spec.revision, trust_remote_code=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise WeightsError(
                f"slide encoder {spec.name} cannot be loaded: {first}",
                remedy=f"accept its licence at https://huggingface.co/{spec.hub_id} and log in (hf auth login)",
            ) from error
        self._model = model.to(device).eval()

    def encode(self, features: NDArray[np.float32], coords: NDArray[np.int64], tile_l0: int) -> NDArray[np.float32]:
        """The vector (W,) of features (N, D), their corners on level 0 (N, 2), and the tiles' side there."""
        import torch

        tiles = torch.from_numpy(features)[None].to(self._device)
        with torch.inference_mode():
            if self.spec.name == "prism":
                found = self._model.slide_representations(tiles)["image_embedding"]
            else:
                places = torch.from_numpy(coords)[None].to(self._device)
                found = self._model.encode_slide_from_patch_features(tiles, places, tile_l0)
        vector: NDArray[np.float32] = found.reshape(-1).float().cpu().numpy()
        return vector
