"""Key names and shapes of published checkpoints, written down from the sources that each list names.

They are not made from wsi-pipe's own networks, so that a test that loads them proves something.
"""

from __future__ import annotations

from collections.abc import Callable

Shapes = dict[str, tuple[int, ...]]


def timm_vit(
    dim: int, depth: int, *, patch: int, tokens: int, fc1: int, fc2: int, scale: bool, registers: int = 0
) -> Shapes:
    """A ViT as timm saves it.

    Source: timm/models/vision_transformer.py (huggingface/pytorch-image-models). Sizes that its users read off the
    files: Virchow pos_embed (1, 257, 1280), no reg_token, fc1 (6832, 1280), fc2 (1280, 3416); H-optimus-0 reg_token
    (1, 4, 1536); UNI2-h reg_token (1, 8, 1536).
    """
    shapes: Shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, tokens, dim)}
    if registers:
        shapes["reg_token"] = (1, registers, dim)
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for block in range(depth):
        at = f"blocks.{block}."
        shapes |= {f"{at}{norm}.{kind}": (dim,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"{at}attn.qkv.weight": (3 * dim, dim), f"{at}attn.qkv.bias": (3 * dim,)}
        shapes |= {f"{at}attn.proj.weight": (dim, dim), f"{at}attn.proj.bias": (dim,)}
        shapes |= {f"{at}mlp.fc1.weight": (fc1, dim), f"{at}mlp.fc1.bias": (fc1,)}
        shapes |= {f"{at}mlp.fc2.weight": (dim, fc2), f"{at}mlp.fc2.bias": (dim,)}
        if scale:
            shapes |= {f"{at}ls1.gamma": (dim,), f"{at}ls2.gamma": (dim,)}
    return shapes | {"norm.weight": (dim,), "norm.bias": (dim,)}


def hf_vit(dim: int, depth: int) -> Shapes:
    """Phikon: transformers' ViTModel, ViT-B/16.

    Source: transformers v4.46, models/vit/modeling_vit.py; owkin/phikon loads with ViTModel.from_pretrained(...,
    add_pooling_layer=False) (TRIDENT, load.py).
    """
    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, dim),
        "embeddings.position_embeddings": (1, 197, dim),
        "embeddings.patch_embeddings.projection.weight": (dim, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": (dim,),
        "layernorm.weight": (dim,),
        "layernorm.bias": (dim,),
    }
    for layer in range(depth):
        at = f"encoder.layer.{layer}."
        parts = {
            "attention.attention.query": (dim, dim),
            "attention.attention.key": (dim, dim),
            "attention.attention.value": (dim, dim),
            "attention.output.dense": (dim, dim),
            "intermediate.dense": (4 * dim, dim),
            "output.dense": (dim, 4 * dim),
            "layernorm_before": (dim,),
            "layernorm_after": (dim,),
        }
        for name, shape in parts.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
    return shapes


def hf_dinov2(dim: int, depth: int, *, patch: int, tokens: int, swiglu: int | None, registers: int = 0) -> Shapes:
    """Phikon-v2 and Midnight-12k: transformers' Dinov2Model; Hibou: its custom Dinov2ModelWithRegisters.

    Source: transformers v4.46, models/dinov2/modeling_dinov2.py. For Hibou the same names with register_tokens, four
    of them, and a SwiGLU of 2048 (B) and 2736 (L): wsi-toolbox, presets/tile/hibou.py and its test. swiglu: hidden
    width after gating, None for a plain MLP of 4 * dim.
    """
    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, dim),
        "embeddings.mask_token": (1, dim),
        "embeddings.position_embeddings": (1, tokens, dim),
        "embeddings.patch_embeddings.projection.weight": (dim, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (dim,),
        "layernorm.weight": (dim,),
        "layernorm.bias": (dim,),
    }
    if registers:
        shapes["embeddings.register_tokens"] = (1, registers, dim)
    for layer in range(depth):
        at = f"encoder.layer.{layer}."
        parts = {
            "attention.attention.query": (dim, dim),
            "attention.attention.key": (dim, dim),
            "attention.attention.value": (dim, dim),
            "attention.output.dense": (dim, dim),
            "norm1": (dim,),
            "norm2": (dim,),
        }
        if swiglu is None:
            parts |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
        else:
            parts |= {"mlp.weights_in": (2 * swiglu, dim), "mlp.weights_out": (dim, swiglu)}
        for name, shape in parts.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        shapes |= {f"{at}layer_scale1.lambda1": (dim,), f"{at}layer_scale2.lambda1": (dim,)}
    return shapes


def meta_dinov2(dim: int, depth: int, *, patch: int, tokens: int, swiglu: int, registers: int) -> Shapes:
    """OpenMidnight: DINOv2 ViT-g/14 with registers as facebookresearch/dinov2 saves it.

    Source: dinov2/models/vision_transformer.py and layers/swiglu_ffn.py (w12, w3); that the file is flat, with 4
    registers and 40 blocks of 1536: raw2features, embedders/dino_teacher_embedder.py.
    """
    shapes: Shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, tokens, dim),
        "register_tokens": (1, registers, dim),
        "mask_token": (1, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    for block in range(depth):
        at = f"blocks.{block}."
        parts = {
            "norm1": (dim,), "norm2": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim),
            "mlp.w12": (2 * swiglu, dim), "mlp.w3": (dim, swiglu),
        }  # fmt: skip
        for name, shape in parts.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        shapes |= {f"{at}ls1.gamma": (dim,), f"{at}ls2.gamma": (dim,)}
    return shapes


def conch_v1(depth: int) -> Shapes:
    """CONCH v1: the image tower's keys of its CoCa checkpoint, and some of the text tower's, which stay unused.

    Source: mahmoodlab/CONCH, open_clip_custom/{coca_model,vision_tower,transformer}.py and conch_ViT-B-16.json.
    """
    trunk = timm_vit(768, depth, patch=16, tokens=785, fc1=3072, fc2=3072, scale=False)
    shapes = {f"visual.trunk.{key}": shape for key, shape in trunk.items()}
    for name, dim, queries in (("contrast", 512, 1), ("caption", 768, 256)):
        at = f"visual.attn_pool_{name}."
        shapes |= {
            f"{at}query": (queries, dim),
            f"{at}attn.out_proj.weight": (dim, dim),
            f"{at}attn.out_proj.bias": (dim,),
        }
        shapes[f"{at}attn.in_proj_bias"] = (3 * dim,)
        if dim == 768:  # context and query have one width: a single matrix
            shapes[f"{at}attn.in_proj_weight"] = (3 * dim, dim)
        else:
            shapes |= {f"{at}attn.q_proj_weight": (dim, dim), f"{at}attn.k_proj_weight": (dim, 768)}
            shapes[f"{at}attn.v_proj_weight"] = (dim, 768)
        shapes |= {f"{at}ln_q.{kind}": (dim,) for kind in ("weight", "bias")}
        shapes |= {f"{at}ln_k.{kind}": (768,) for kind in ("weight", "bias")}
        shapes |= {f"visual.ln_{name}.{kind}": (dim,) for kind in ("weight", "bias")}
    shapes["visual.proj_contrast"] = (512, 512)
    return shapes | {"logit_scale": (), "text.text_projection": (768, 512), "text.cls_emb": (768,)}


def conch_v1_5(depth: int) -> Shapes:
    """CONCH v1.5's image tower. Source: TRIDENT v0.1.1, model_zoo/conchv1_5/conchv1_5.py."""
    trunk = timm_vit(1024, depth, patch=16, tokens=197, fc1=4096, fc2=4096, scale=True)
    shapes = {f"trunk.{key}": shape for key, shape in trunk.items()}
    at = "attn_pool_contrast."
    return shapes | {
        f"{at}query": (1, 768), f"{at}ln_k.weight": (1024,), f"{at}ln_k.bias": (1024,), f"{at}ln_q.weight": (768,),
        f"{at}ln_q.bias": (768,), f"{at}to_q.weight": (768, 768), f"{at}to_kv.weight": (1536, 1024),
        f"{at}to_out.weight": (768, 768), "ln_contrast.weight": (768,), "ln_contrast.bias": (768,),
    }  # fmt: skip


def ctranspath() -> Shapes:
    """CTransPath: Swin-T of timm 0.5.4 with a convolutional stem; down-sampling stands at the end of a stage there.

    Source: Xiyue-Wang/TransPath, ctran.py; LazySlide, export_ctranspath_chief.py (Swin of timm 0.5.4 written out).
    """
    shapes: Shapes = {"patch_embed.norm.weight": (96,), "patch_embed.norm.bias": (96,)}
    shapes |= {"patch_embed.proj.0.weight": (12, 3, 3, 3), "patch_embed.proj.3.weight": (24, 12, 3, 3)}
    shapes |= {"patch_embed.proj.6.weight": (96, 24, 1, 1), "patch_embed.proj.6.bias": (96,)}
    for place, width in ((1, 12), (4, 24)):
        names = ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"patch_embed.proj.{place}.{name}": (width,) for name in names}
        shapes[f"patch_embed.proj.{place}.num_batches_tracked"] = ()
    for stage, (depth, heads) in enumerate(zip((2, 2, 6, 2), (3, 6, 12, 24), strict=True)):
        dim, side = 96 << stage, 56 >> stage
        for block in range(depth):
            at = f"layers.{stage}.blocks.{block}."
            parts = {
                "norm1": (dim,), "norm2": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim),
                "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim),
            }  # fmt: skip
            for name, shape in parts.items():
                shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
            shapes[f"{at}attn.relative_position_bias_table"] = (169, heads)
            shapes[f"{at}attn.relative_position_index"] = (49, 49)
            if block % 2 and side > 7:
                shapes[f"{at}attn_mask"] = ((side // 7) ** 2, 49, 49)
        if stage < 3:
            at = f"layers.{stage}.downsample."
            shapes |= {f"{at}reduction.weight": (2 * dim, 4 * dim), f"{at}norm.weight": (4 * dim,)}
            shapes[f"{at}norm.bias"] = (4 * dim,)
    return shapes | {"norm.weight": (768,), "norm.bias": (768,)}


def resnet50() -> Shapes:
    """ResNet50 as torchvision and timm save it, with its ImageNet head. Source: torchvision/models/resnet.py."""

    def norm(at: str, width: int) -> Shapes:
        named = {f"{at}.{name}": (width,) for name in ("weight", "bias", "running_mean", "running_var")}
        return named | {f"{at}.num_batches_tracked": ()}

    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    before = 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}."
            shapes |= {f"{at}conv1.weight": (width, before, 1, 1), **norm(f"{at}bn1", width)}
            shapes |= {f"{at}conv2.weight": (width, width, 3, 3), **norm(f"{at}bn2", width)}
            shapes |= {f"{at}conv3.weight": (4 * width, width, 1, 1), **norm(f"{at}bn3", 4 * width)}
            if block == 0:
                shapes |= {
                    f"{at}downsample.0.weight": (4 * width, before, 1, 1),
                    **norm(f"{at}downsample.1", 4 * width),
                }
            before = 4 * width
    return shapes | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


def without_head(shapes: Shapes) -> Shapes:
    """Without the classifier, as RetCCL's authors save it (get_feature.py takes ``fc`` off before it loads)."""
    return {key: shape for key, shape in shapes.items() if not key.startswith("fc.")}


def keep(depth: int) -> Shapes:
    """KEEP: a timm ViT-L/16 whose LayerScale is called ``weight``, a head of two layers, and some of its text tower.

    Source: raw2features, embedders/keep_embedder.py.
    """
    trunk = timm_vit(1024, depth, patch=16, tokens=197, fc1=4096, fc2=4096, scale=True)
    shapes = {f"visual.{key.replace('gamma', 'weight')}": shape for key, shape in trunk.items()}
    for layer, width in ((0, 1024), (2, 768)):
        shapes |= {f"visual_head.{layer}.weight": (768, width), f"visual_head.{layer}.bias": (768,)}
    return shapes | {"logit_scale": (), "text.embeddings.word_embeddings.weight": (30522, 768)}


def _hf_tower_blocks(dim: int, depth: int, hidden: int) -> Shapes:
    """Blocks of the vision models of transformers' CLIPModel and SiglipModel."""
    shapes: Shapes = {}
    for layer in range(depth):
        at = f"vision_model.encoder.layers.{layer}."
        parts = {f"self_attn.{part}_proj": (dim, dim) for part in ("k", "v", "q", "out")}
        parts |= {"layer_norm1": (dim,), "layer_norm2": (dim,), "mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
        for name, shape in parts.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
    return shapes


def plip(depth: int) -> Shapes:
    """PLIP: transformers' CLIPModel, ViT-B/32. Source: transformers v4.46, models/clip/modeling_clip.py."""
    at = "vision_model.embeddings."
    shapes: Shapes = {
        f"{at}class_embedding": (768,), f"{at}position_ids": (1, 50), f"{at}position_embedding.weight": (50, 768),
        f"{at}patch_embedding.weight": (768, 3, 32, 32), "visual_projection.weight": (512, 768),
        "text_projection.weight": (512, 512), "logit_scale": (), "text_model.final_layer_norm.weight": (512,),
    }  # fmt: skip
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"vision_model.{norm}.{kind}": (768,) for kind in ("weight", "bias")}
    return shapes | _hf_tower_blocks(768, depth, 3072)


def medsiglip(depth: int) -> Shapes:
    """MedSigLIP: transformers' SiglipModel, So400m/14 at 448 px.

    Source: transformers v4.46, models/siglip/modeling_siglip.py; widths of So400m: timm, vision_transformer.py.
    """
    at, head = "vision_model.embeddings.", "vision_model.head."
    shapes: Shapes = {
        f"{at}patch_embedding.weight": (1152, 3, 14, 14), f"{at}patch_embedding.bias": (1152,),
        f"{at}position_embedding.weight": (1024, 1152), f"{head}probe": (1, 1, 1152),
        f"{head}attention.in_proj_weight": (3456, 1152), f"{head}attention.in_proj_bias": (3456,),
        "logit_scale": (1,), "logit_bias": (1,), "text_model.head.weight": (1152, 1152),
    }  # fmt: skip
    parts = {
        "vision_model.post_layernorm": (1152,), f"{head}attention.out_proj": (1152, 1152), f"{head}layernorm": (1152,),
        f"{head}mlp.fc1": (4304, 1152), f"{head}mlp.fc2": (1152, 4304),
    }  # fmt: skip
    for name, shape in parts.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes | _hf_tower_blocks(1152, depth, 4304)


def dinov3(dim: int, depth: int) -> Shapes:
    """DINOv3 as timm saves it: rotary positions, 4 registers, no bias of query, key and value.

    Source: timm/models/eva.py.
    """
    shapes: Shapes = {
        "cls_token": (1, 1, dim), "reg_token": (1, 4, dim), "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,),
    }  # fmt: skip
    for block in range(depth):
        at = f"blocks.{block}."
        parts = {
            "norm1": (dim,), "norm2": (dim,), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim),
            "mlp.fc2": (dim, 4 * dim),
        }  # fmt: skip
        for name, shape in parts.items():
            shapes |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
        shapes |= {f"{at}attn.qkv.weight": (3 * dim, dim), f"{at}gamma_1": (dim,), f"{at}gamma_2": (dim,)}
    return shapes


def _plain(dim: int, patch: int, tokens: int, *, scale: bool = False, registers: int = 0) -> Callable[[int], Shapes]:
    hidden = 4 * dim
    return lambda depth: timm_vit(
        dim, depth, patch=patch, tokens=tokens, fc1=hidden, fc2=hidden, scale=scale, registers=registers
    )


def _gated(dim: int, patch: int, tokens: int, fc1: int, *, registers: int = 0) -> Callable[[int], Shapes]:
    return lambda depth: timm_vit(
        dim, depth, patch=patch, tokens=tokens, fc1=fc1, fc2=fc1 // 2, scale=True, registers=registers
    )


# name -> (published depth, None where it cannot be cut short; keys and shapes at a depth; dimension of the features).
PUBLISHED: dict[str, tuple[int | None, Callable[[int], Shapes], int]] = {
    "uni": (24, _plain(1024, 16, 197, scale=True), 1024),
    "uni2-h": (24, _gated(1536, 14, 256, 8192, registers=8), 1536),
    "conch": (12, conch_v1, 512),
    "conch_trunk": (12, conch_v1, 768),
    "conch_v1_5": (24, conch_v1_5, 768),
    "virchow": (32, _gated(1280, 14, 257, 6832), 2560),
    "virchow2": (32, _gated(1280, 14, 261, 6832, registers=4), 2560),
    "prov-gigapath": (40, _gated(1536, 16, 197, 8192), 1536),
    "h-optimus-0": (40, _gated(1536, 14, 256, 8192, registers=4), 1536),
    "h-optimus-1": (40, _gated(1536, 14, 256, 8192, registers=4), 1536),
    "h0-mini": (12, _gated(768, 14, 256, 4096, registers=4), 768),
    "phikon": (12, lambda depth: hf_vit(768, depth), 768),
    "phikon-v2": (24, lambda depth: hf_dinov2(1024, depth, patch=16, tokens=197, swiglu=None), 1024),
    "hibou-b": (12, lambda depth: hf_dinov2(768, depth, patch=14, tokens=257, swiglu=2048, registers=4), 768),
    "hibou-l": (24, lambda depth: hf_dinov2(1024, depth, patch=14, tokens=257, swiglu=2736, registers=4), 1024),
    "kaiko-vits16": (12, _plain(384, 16, 197), 384),
    "kaiko-vits8": (12, _plain(384, 8, 785), 384),
    "kaiko-vitb16": (12, _plain(768, 16, 197), 768),
    "kaiko-vitb8": (12, _plain(768, 8, 785), 768),
    "kaiko-vitl14": (24, _plain(1024, 14, 1369, scale=True, registers=4), 1024),
    "lunit-vits8": (12, _plain(384, 8, 785), 384),
    "ctranspath": (None, lambda depth: ctranspath(), 768),
    "gpfm": (24, _plain(1024, 14, 257, scale=True), 1024),
    "midnight-12k": (40, lambda depth: hf_dinov2(1536, depth, patch=14, tokens=1370, swiglu=4096), 3072),
    "openmidnight": (
        40,
        lambda depth: meta_dinov2(1536, depth, patch=14, tokens=257, swiglu=4096, registers=4),
        1536,
    ),
    "resnet50": (None, lambda depth: resnet50(), 2048),
    "gigapath-flash": (12, _gated(384, 16, 197, 2048), 384),
    "pathorchestra": (24, _plain(1024, 16, 197, scale=True), 1024),
    "mstar": (24, _plain(1024, 16, 197, scale=True), 1024),
    "digepath": (24, _plain(1024, 16, 197, scale=True), 1024),
    "keep": (24, keep, 768),
    "plip": (12, plip, 512),
    # A network without CLS, into which one cannot look block by block: its depth counts as none.
    "medsiglip": (27, medsiglip, 1152),
    "sp22m": (12, lambda depth: {f"encoder.{key}": shape for key, shape in _plain(384, 16, 197)(depth).items()}, 384),
    "lunit-vits16": (12, _plain(384, 16, 197), 384),
    "retccl": (None, lambda depth: without_head(resnet50()), 2048),
    "dinobloom-s": (12, _plain(384, 14, 257, scale=True), 384),
    "dinobloom-b": (12, _plain(768, 14, 257, scale=True), 768),
    "dinobloom-l": (24, _plain(1024, 14, 257, scale=True), 1024),
    "dinobloom-g": (40, _gated(1536, 14, 257, 8192), 1536),
    "dinov2-s": (12, _plain(384, 14, 1370, scale=True), 384),
    "dinov2-b": (12, _plain(768, 14, 1370, scale=True), 768),
    "dinov2-l": (24, _plain(1024, 14, 1370, scale=True), 1024),
    "dinov2-g": (40, _gated(1536, 14, 1370, 8192), 1536),
    "dinov3-s": (12, lambda depth: dinov3(384, depth), 384),
    "dinov3-b": (12, lambda depth: dinov3(768, depth), 768),
    "dinov3-l": (24, lambda depth: dinov3(1024, depth), 1024),
}

NO_LAYERS = {"medsiglip"}
"""Networks of blocks, of which none has a CLS to be taken."""
