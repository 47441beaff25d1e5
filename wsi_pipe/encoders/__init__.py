"""Encoders: uint8 tiles in, features out.

Importing this package costs nothing: torch and timm are imported when an encoder that needs them is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsi_pipe.config import ExtractSettings
    from wsi_pipe.encoders.base import Encoder
    from wsi_pipe.encoders.listing import EncoderListing

__all__ = ["encoder_of_job", "list_encoders", "load_encoder"]


def load_encoder(
    name: str,
    *,
    device: str | Sequence[str] = "auto",
    precision: str = "auto",
    random_weights: bool = False,
    compile: bool = False,
    input_px: int | None = None,
) -> Encoder:
    """The encoder called ``name``, ready to encode.

    name: "texture", a name of the registry, either of them followed by ``@FILE`` for weights of one's own,
    ``timm:MODEL`` or ``timm:MODEL@FILE``, a name of ``wp.register_encoder``, or the path of an LR encoder
    (``.safetensors``). device: a device, several separated by commas (a replica on each), or "auto" (every GPU,
    else the CPU). precision: "auto" (half where the device has hardware for it), "float32", "bfloat16" or
    "float16". random_weights: weights drawn anew, the same for one name in every process, for trying things out
    without a download; name and slug end with "-random", and weights that are given as a file are never drawn.
    compile: through torch.compile. input_px: another input side than the network's own; a ViT's position embeddings
    are interpolated to it.

    Behind each of them may stand ``+macenko`` or ``+reinhard``: tiles are brought to one reference's colours first.

    Raises UnknownEncoderError, WeightsError (not there, gated, keys missing), DeviceError or ConfigError.
    """
    from wsi_pipe.encoders.naming import split_stain

    bare, stain = split_stain(name)
    if stain is not None:
        from wsi_pipe.encoders.own import handed_over
        from wsi_pipe.encoders.stain import stained

        plain = load_encoder(
            bare,
            device=device,
            precision=precision,
            random_weights=random_weights,
            compile=compile,
            input_px=input_px,
        )
        return stained(plain, stain, own=handed_over(bare) is None)
    if name == "texture":
        from wsi_pipe.encoders.texture import TextureEncoder

        return TextureEncoder()
    from wsi_pipe.encoders.own import handed_over

    ready = handed_over(name)
    if ready is not None:
        return ready
    from wsi_pipe.encoders.loading import load_torch_encoder

    return load_torch_encoder(
        name,
        device=device,
        precision=precision,
        random_weights=random_weights,
        compile=compile,
        input_px=input_px,
    )


def encoder_of_job(name: str, settings: ExtractSettings) -> Encoder:
    """The encoder called ``name`` as a job's settings want it.

    ``settings.random_weights`` stands in for a download: weights that the name gives as a file are loaded all the same.
    Raises as ``load_encoder``.
    """
    from wsi_pipe.encoders.naming import draws_weights

    return load_encoder(
        name,
        device=",".join(settings.devices),
        precision=settings.precision,
        random_weights=settings.random_weights and draws_weights(name),
        compile=settings.compile,
    )


def list_encoders() -> list[EncoderListing]:
    """Every encoder of the registry with what it is, whether it can be loaded now, and what it lacks otherwise.

    Looks at this machine only (caches, folders, a stored login), never at the network.
    """
    from wsi_pipe.encoders.listing import list_encoders

    return list_encoders()
