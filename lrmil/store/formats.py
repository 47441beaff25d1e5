"""Feature bags as they lie on disk: this project's schema, TRIDENT's, CLAM's, STAMP's, and tensors alone.

What a file states about itself is believed before what the user says; where both speak and differ, that is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lrmil.errors import BagMismatchError, StoreError
from lrmil.store.info import BagFormat, BagInfo
from lrmil.store.tensors import read_tensor, tensor_facts, tensor_places, tensor_shape
from wsi_pipe.bag import content_digest, refuse_unsafe, unreachable
from wsi_pipe.encoders.elsewhere import same_encoder, slug_asked_for
from wsi_pipe.errors import BagError, WsiPipeError
from wsi_pipe.geometry import level_label

__all__ = ["BagFormat", "BagInfo", "inspect_here", "inspect_tensor", "read_features", "read_places"]


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    remedy = "make the bag again or leave it out"
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        if (outside := unreachable(path, error)) is not None:
            raise outside from error
        raise StoreError(f"{path} is not a readable HDF5 file: {_first_line(error)}", remedy=remedy) from error
    with file:
        try:
            refuse_unsafe(path, file)
            yield file
        except BagError as error:
            raise StoreError(error.message, remedy=error.remedy) from error
        except WsiPipeError:
            raise
        except (KeyError, RuntimeError, OSError, TypeError, ValueError) as error:
            # What h5py and numpy raise for damaged groups, attributes and chunks.
            raise StoreError(f"{path} is damaged: {_first_line(error)}", remedy=remedy) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _file_fingerprint(path: Path, key: str) -> str:
    status = path.stat()
    return f"{key}:{status.st_size}:{status.st_mtime_ns}"


def inspect_here(path: Path, level: str | None, encoder: str | None, *, weights_sha256: str) -> BagInfo:
    """``lrmil.store.inspect_bag`` in this process, which a damaged file may hang.

    It also opens all that ``read_features`` and ``read_places`` will open, and counts the arrays' chunks: HDF5 may
    loop in a file's structure, but not in the arrays, which are nearly all of it and are not read.
    """
    with _open(path) as file:
        info = _inspect(path, file, level, encoder, weights_sha256)
        # What raises in it raises again where it is read, and is told there.
        with contextlib.suppress(Exception):
            _touch(file, info)
        return info


def _inspect(path: Path, file: h5py.File, level: str | None, encoder: str | None, weights_sha256: str) -> BagInfo:
    if "levels" in file:
        return _inspect_own(path, file, level, encoder, weights_sha256)
    if "feats" in file:
        return _inspect_stamp(path, file, level, encoder)
    if "features" in file:
        return _inspect_root(path, file, level, encoder)
    raise StoreError(
        f"{path} is no feature bag: it has neither /levels nor /features nor /feats",
        remedy="give bags of wsi-pipe, TRIDENT, CLAM or STAMP (features, not coordinates alone)",
    )


def _touch(file: h5py.File, info: BagInfo) -> None:
    arrays = [_features_of(file, info)]
    _ = arrays[0].attrs.get("sha256")
    for group in file["levels"].values() if info.format == "wsi-pipe" else [file]:
        arrays += [group[name] for name in ("cells", "coords", "parent") if name in group]
    for array in arrays:
        if array.chunks is not None:
            array.id.get_num_chunks()


def _choose(path: Path, kind: str, wanted: str | None, names: list[str], primary: str) -> str:
    if wanted is not None:
        if wanted in names:
            return wanted
        raise BagMismatchError(
            f"{path} has no {kind} {wanted!r}", remedy=f"it has {', '.join(sorted(names)) or 'none at all'}"
        )
    if len(names) == 1:
        return names[0]
    if primary in names:
        return primary
    raise BagMismatchError(f"{path} has {len(names)} {kind}s", remedy=f"choose one of {', '.join(sorted(names))}")


def _own_paths(path: Path, file: h5py.File, level: str | None, encoder: str | None, weights: str) -> tuple[str, str]:
    label = _choose(path, "level", level, list(file["levels"]), _text(file.attrs.get("primary_level", "")))
    group = file["levels"][label]
    features = group.get("features", {})
    same = [slug for slug, data in features.items() if weights and _text(data.attrs["weights_sha256"]) == weights]
    if same:
        return label, same[0]
    names = {slug: _text(data.attrs.get("encoder", slug)) for slug, data in features.items()}
    # A name on the command line may be the encoder's own or the one in paths.
    exact = next((slug for slug, name in names.items() if encoder in (slug, name)), None)
    wanted = exact or (encoder and slug_asked_for(encoder))
    if wanted and wanted not in names:
        # Named by an alias when the bag was made, under a slug of its own.
        wanted = next((slug for slug, name in names.items() if same_encoder(name, wanted)), wanted)
    primary = _text(file.attrs.get("primary_encoder", ""))
    return label, _choose(path, f"encoder at {label}", wanted, list(names), primary)


def _inspect_own(path: Path, file: h5py.File, level: str | None, encoder: str | None, weights: str) -> BagInfo:
    label, slug = _own_paths(path, file, level, encoder, weights)
    group = file["levels"][label]
    features, cells = group["features"][slug], group["cells"].attrs
    rows, dim = _shape(path, features.shape)
    status = _text(file.attrs.get("status", "done"))
    case = _text(file.attrs.get("case_id", ""))
    size = np.atleast_1d(np.asarray(cells["tile_size_l0"], float))
    return BagInfo(
        path=str(path),
        format="wsi-pipe",
        slide_id=_text(file.attrs.get("slide_id", path.stem)),
        case_id=case or None,
        rows=rows,
        dim=dim,
        encoder=_text(features.attrs.get("encoder", slug)),
        slug=slug,
        weights_sha256=_text(features.attrs.get("weights_sha256", "")),
        level=label,
        mpp=float(cells["mpp"]),
        tile_px=int(cells["tile_size_px"]),
        tile_size_l0=(float(size[0]), float(size[-1])),
        coords_unit="px_l0",
        fingerprint=_text(features.attrs.get("fingerprint", "")) or _file_fingerprint(path, f"{label}/{slug}"),
        has_parent="parent" in group,
        empty_reason=(_text(file.attrs.get("empty_reason", "")) or "no tissue") if status == "empty" else None,
        bounds_l0=_bounds(file.attrs.get("bounds_l0")),
        slide_fingerprint=_text(file.attrs.get("slide_fingerprint", "")),
        encoder_saw=_text(features.attrs.get("encoder_saw", "")),
    )


def _bounds(value: Any) -> tuple[int, int, int, int] | None:
    if value is None:
        return None
    x, y, width, height = (int(number) for number in value)
    return (x, y, width, height)


def _shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    given = shape
    if len(shape) == 3 and shape[0] == 1:  # some versions of TRIDENT keep a batch axis
        shape = shape[1:]
    if len(shape) != 2:
        raise StoreError(f"{path}: features must be (N, D), not {given}", remedy="make the bag again")
    return int(shape[0]), int(shape[1])


def _agreed_level(path: Path, level: str | None, mpp: float | None) -> str:
    """The level's label: the file's where it states a resolution, checked against what is asked for."""
    if mpp is None:
        return level or ""
    stated = level_label(mpp)
    if level is not None and level != stated:
        raise BagMismatchError(
            f"{path} holds features at {stated} ({mpp:g} um/px), not at {level}", remedy=f"ask for -r {stated}"
        )
    return stated


def _agreed_encoder(path: Path, encoder: str | None, stated: str) -> str:
    if not stated:
        return encoder or ""
    if encoder is not None and not same_encoder(encoder, stated):
        raise BagMismatchError(f"{path} holds features of {stated}, not of {encoder}", remedy=f"ask for {stated}")
    return stated


def _inspect_stamp(path: Path, file: h5py.File, level: str | None, encoder: str | None) -> BagInfo:
    rows, dim = _shape(path, file["feats"].shape)
    attrs = file.attrs
    tile_um, tile_px = attrs.get("tile_size_um"), attrs.get("tile_size_px")
    mpp = float(tile_um) / int(tile_px) if tile_um is not None and tile_px is not None else None
    own = {name.removeprefix(OWN): value for name, value in attrs.items() if name.startswith(OWN)}
    # Exported by this project: STAMP's own words hold what was cut, which may differ a little from what was asked for.
    mpp = float(own["mpp"]) if "mpp" in own else mpp
    return BagInfo(
        path=str(path),
        format="stamp",
        slide_id=path.stem,
        case_id=_case(own),
        rows=rows,
        dim=dim,
        slug="feats",
        encoder=_agreed_encoder(
            path, encoder, _text(own.get("encoder", attrs.get("extractor", attrs.get("encoder", ""))))
        ),
        weights_sha256=_text(own.get("weights_sha256", "")),
        level=_agreed_level(path, level, mpp),
        mpp=mpp,
        tile_px=None if tile_px is None else int(tile_px),
        tile_size_l0=None,
        coords_unit="um" if _text(attrs.get("unit", "um")) == "um" else "px_l0",
        fingerprint=_file_fingerprint(path, "feats"),
        slide_fingerprint=_text(own.get("slide_fingerprint", "")),
    )


OWN = "wsi_pipe_"
"""What this project's exports add to STAMP's attributes begins with it."""


def _case(own: Mapping[str, Any]) -> str | None:
    return _text(own["case_id"]) if own.get("case_id") else None


def inspect_tensor(path: Path, level: str | None, encoder: str | None) -> BagInfo:
    """Facts about a bag that is one tensor. Raises StoreError as ``inspect_here`` does."""
    rows, dim = _shape(path, tensor_shape(path))
    told = tensor_facts(path)
    own = told["wsi_pipe"] if isinstance(told.get("wsi_pipe"), dict) else {}
    spacing, tile_px = told.get("requested_spacing_um"), told.get("requested_tile_size_px")
    mpp = None if spacing is None else float(spacing)
    size = told.get("tile_size_lv0")
    return BagInfo(
        path=str(path),
        format="pt",
        slide_id=path.stem,
        case_id=_case(own),
        rows=rows,
        dim=dim,
        slug="features",
        encoder=_agreed_encoder(path, encoder, _text(own.get("encoder", told.get("encoder_name", "")))),
        weights_sha256=_text(own.get("weights_sha256", "")),
        level=_agreed_level(path, level, mpp),
        mpp=mpp,
        tile_px=None if tile_px is None else int(tile_px),
        tile_size_l0=None if size is None else (float(size), float(size)),
        coords_unit="px_l0",
        fingerprint=_file_fingerprint(path, "pt"),
        slide_fingerprint=_text(own.get("slide_fingerprint", "")),
    )


def _inspect_root(path: Path, file: h5py.File, level: str | None, encoder: str | None) -> BagInfo:
    rows, dim = _shape(path, file["features"].shape)
    place = dict(file["coords"].attrs) if "coords" in file else {}
    trident = "target_magnification" in place
    mpp = 10.0 / float(place["target_magnification"]) if trident else None
    size = place.get("patch_size_level0")
    own = file["features"].attrs
    stated = _text(own.get("encoder", file.attrs.get("encoder", "")))
    return BagInfo(
        path=str(path),
        format="trident" if trident else "clam",
        slide_id=path.stem,
        case_id=_case(own),
        rows=rows,
        dim=dim,
        slug="features",
        encoder=_agreed_encoder(path, encoder, stated),
        weights_sha256=_text(own.get("weights_sha256", "")),
        level=_agreed_level(path, level, mpp),
        mpp=mpp,
        tile_px=int(place["patch_size"]) if "patch_size" in place else None,
        tile_size_l0=None if size is None else (float(size), float(size)),
        coords_unit="px_l0",
        fingerprint=_file_fingerprint(path, "features"),
        slide_fingerprint=_text(own.get("slide_fingerprint", "")),
    )


def _features_of(file: h5py.File, info: BagInfo) -> h5py.Dataset:
    if info.format == "wsi-pipe":
        return file["levels"][info.level]["features"][info.slug]
    return file["feats" if info.format == "stamp" else "features"]


def read_features(info: BagInfo) -> NDArray[np.floating[Any]]:
    """Features of an inspected bag, (rows, dim), in the file's float type.

    Raises StoreError when the file is unreadable, has changed since, is damaged (by the digest in it), or holds NaN or
    infinity.
    """
    values = read_tensor(Path(info.path)) if info.format == "pt" else _stored(info)
    if values.ndim == 3:
        values = values[0]
    if values.shape != (info.rows, info.dim):
        raise StoreError(f"{info.path} changed while it was read", remedy="wait until its writer is done")
    if not np.issubdtype(values.dtype, np.floating):
        raise StoreError(f"{info.path}: features are {values.dtype}, not floating point", remedy="make the bag again")
    if _suspect(values):
        bad = int((~np.isfinite(values)).any(axis=1).sum())
        if bad:
            raise StoreError(f"{info.path}: {bad} of {info.rows} rows hold NaN or infinity", remedy="extract it again")
    return values


def _stored(info: BagInfo) -> NDArray[Any]:
    with _open(Path(info.path)) as file:
        data = _features_of(file, info)
        values: NDArray[Any] = np.asarray(data[()])
        if info.format == "wsi-pipe" and "sha256" in data.attrs and content_digest([values]) != data.attrs["sha256"]:
            raise StoreError(f"{info.path}: features are not what was written", remedy="run wsi-pipe verify --repair")
    return values


def _suspect(values: NDArray[np.floating[Any]]) -> bool:
    """False where all values are surely finite; cheaper than looking at each."""
    if not values.size:
        return False
    if values.dtype == np.float16:
        # All exponent bits set is infinity or NaN; arithmetic on float16 is slow on CPUs.
        return int((values.view(np.uint16) & 0x7C00).max()) == 0x7C00
    # A sum is not finite if any value is not; that it may overflow too costs a second look.
    with np.errstate(over="ignore", invalid="ignore"):
        return not np.isfinite(values.sum())


def read_places(info: BagInfo, parent_level: str | None = None) -> tuple[NDArray[np.float64], NDArray[np.int32] | None]:
    """Coordinates float64 (rows, 2) and, with ``parent_level``, int32 (rows,): the row of ``parent_level`` above each.

    Coordinates are NaN where the file has none. Parents are composed through the levels in between.
    Raises StoreError when the level is not coarser or the bag holds no parent index.
    """
    coords = np.full((info.rows, 2), np.nan)
    if info.format == "pt":
        if parent_level is not None:
            raise StoreError(f"{info.path} is a tensor and has no parent index", remedy="give bags of wsi-pipe")
        found = tensor_places(Path(info.path), info.rows)
        return (coords if found is None else found), None
    with _open(Path(info.path)) as file:
        group = file["levels"][info.level] if info.format == "wsi-pipe" else file
        if "coords" in group:
            found = np.asarray(group["coords"][()], np.float64).reshape(-1, 2)
            if len(found) != info.rows:
                raise StoreError(
                    f"{info.path}: {len(found)} coordinates for {info.rows} features", remedy="make the bag again"
                )
            coords = found
        parents = None if parent_level is None else _parents(file, info, parent_level)
    return coords, parents


def _parents(file: h5py.File, info: BagInfo, parent_level: str) -> NDArray[np.int32]:
    if info.format != "wsi-pipe" or parent_level not in file["levels"]:
        raise StoreError(
            f"{info.path} has no level {parent_level} above {info.level}",
            remedy="make bags with both resolutions: wsi-pipe run -r 20x -r 5x",
        )
    mpp = {label: float(group["cells"].attrs["mpp"]) for label, group in file["levels"].items()}
    chain = sorted((label for label in mpp if mpp[info.level] <= mpp[label] < mpp[parent_level]), key=mpp.__getitem__)
    if not chain or chain[0] != info.level:
        raise StoreError(f"{info.path}: {parent_level} is not coarser than {info.level}")
    rows: NDArray[np.int32] = np.arange(info.rows, dtype=np.int32)
    for label in chain:
        group = file["levels"][label]
        if "parent" not in group:
            raise StoreError(f"{info.path}: level {label} has no parent index", remedy="make the bag again")
        rows = np.asarray(group["parent"][()], np.int32)[rows]
    return rows
