"""Every configuration of open_clip in small: same kinds of parts, few layers, narrow widths.

No weights are downloaded: timm's and Hugging Face's parts are made small where they are made.
"""

import copy
from contextlib import contextmanager
from unittest import mock

import open_clip
import timm
import torch
import transformers

from mope_clip.clip import build_clip, tiny_clip

WORDS = tiny_clip()  # its words are the vocabulary of all small models
VOCABULARY = len(WORDS.tokenizer.tokenizer)
HF_SMALL = dict(vocab_size=VOCABULARY, max_position_embeddings=90, pad_token_id=0)
HF_TEXT = {
    'roberta-base': lambda: transformers.RobertaConfig(**HF_BERT),
    'xlm-roberta-base': lambda: transformers.XLMRobertaConfig(**HF_BERT),
    'xlm-roberta-large': lambda: transformers.XLMRobertaConfig(**HF_BERT),
    'facebook/nllb-200-distilled-600M': lambda: transformers.M2M100Config(**HF_M2M),
    'facebook/nllb-200-distilled-1.3B': lambda: transformers.M2M100Config(**HF_M2M),
}
HF_BERT = dict(
    **HF_SMALL,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=64,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
HF_M2M = dict(
    **HF_SMALL,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
)
HF_REAL = {  # as the hub says, for who wants the real sizes
    'roberta-base': lambda: transformers.RobertaConfig(vocab_size=50265),
    'xlm-roberta-base': lambda: transformers.XLMRobertaConfig(vocab_size=250002),
    'xlm-roberta-large': lambda: transformers.XLMRobertaConfig(
        vocab_size=250002,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    ),
    'facebook/nllb-200-distilled-600M': lambda: transformers.M2M100Config(vocab_size=256206),
    'facebook/nllb-200-distilled-1.3B': lambda: transformers.M2M100Config(
        vocab_size=256206, encoder_layers=24, encoder_ffn_dim=8192
    ),
}


def of_vitamin() -> dict:
    "A small convolutional stem, which makes 2 x 2 patches of 32 x 32 pixels"
    from timm.models.vitamin import VitCfg, VitConvCfg

    conv = VitConvCfg(norm_layer='layernorm2d', norm_eps=1e-6)
    stem = VitCfg((8, 16, 32), (1, 1, 1), 8, head_type='1d', conv_cfg=conv)
    return dict(embed_dim=32, depth=3, num_heads=4, img_size=32, embed_cfg=stem)


def timm_options(name: str) -> dict:
    "What makes a model of timm small"
    if name.startswith('vitamin'):
        return of_vitamin()
    if name == 'vit_base_mci_224':  # whose stem has a width of its own
        return dict(depth=2, num_heads=4, img_size=32, mlp_ratio=0.25)
    if name.startswith(('vit_', 'eva')):
        return dict(embed_dim=32, depth=3, num_heads=4, img_size=32, patch_size=8)
    if name.startswith('convnext'):
        return dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    if name.startswith('fastvit'):
        stages = 5 if name in ('fastvit_mci3', 'fastvit_mci4') else 4
        return dict(layers=(1,) * stages, embed_dims=(8, 16, 32, 64, 128)[:stages])
    return {}


@contextmanager
def in_small():
    "Inside, timm and Hugging Face make small models, and nothing asks the hub"
    make, read = timm.create_model, transformers.AutoConfig.from_pretrained

    def small(name, **options):
        return make(name, **{**options, **timm_options(name)})

    def config(name, *args, **options):
        return HF_TEXT[name]() if name in HF_TEXT else read(name, *args, **options)

    with (
        mock.patch.object(timm, 'create_model', small),
        mock.patch.object(transformers.AutoConfig, 'from_pretrained', config),
    ):
        yield


def small_vision(vision: dict) -> dict:
    "The settings of a vision tower in small"
    if 'timm_model_name' in vision:
        return dict(vision, image_size=64 if 'fastvit' in vision['timm_model_name'] else 32)
    if isinstance(vision['layers'], list):
        return dict(vision, layers=[1, 1, 1, 1], width=8, image_size=32)
    small = dict(layers=3, width=32, head_width=8, patch_size=8, image_size=32)
    small = {**vision, **small}
    if 'attentional_pool' in vision:
        small['attn_pooler_queries'] = 6
    return small


def small_text(text: dict) -> dict:
    "The settings of a text tower in small"
    small = {k: v for k, v in text.items() if k not in ('hf_tokenizer_name', 'tokenizer_kwargs')}
    if 'hf_model_name' in text:
        return dict(small, hf_model_pretrained=False)
    sizes = dict(context_length=12, vocab_size=VOCABULARY, width=32, heads=4, layers=2)
    small |= sizes
    if text.get('pool_type') == 'eos':
        small['eos_id'] = VOCABULARY - 1
    return small


def small_config(name: str) -> dict:
    "The configuration of an open_clip model in small"
    full = open_clip.get_model_config(name)
    cfg = copy.deepcopy(full)
    cfg['vision_cfg'], cfg['text_cfg'] = (
        small_vision(full['vision_cfg']),
        small_text(full['text_cfg']),
    )
    cfg['embed_dim'] = 32
    if 'multimodal_cfg' in cfg:
        cfg['multimodal_cfg'] |= dict(
            context_length=12, vocab_size=VOCABULARY, width=32, heads=4, layers=1
        )
    return dict(WORDS.config, name=name, model_cfg=cfg)


def small_clip(name: str, seed: int = 1):
    "A small random model of an open_clip configuration, float64; call it within `in_small`"
    clip = build_clip(small_config(name), WORDS.tokenizer, seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter_name, p in clip.model.named_parameters():
            if (p.ndim < 2 and 'logit' not in parameter_name) or 'gamma' in parameter_name:
                p.add_(0.1 * torch.randn_like(p))  # so that biases, norms and scales matter
            elif p.ndim == 2 and 'trunk' in parameter_name:
                p.normal_(std=p.shape[1] ** -0.5)  # timm starts so near zero that nothing matters
    clip.model.double()
    return clip
