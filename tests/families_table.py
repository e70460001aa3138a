"""What of every pretrained tag of open_clip can be compressed: `make families`, data/families.csv.

Weights are not downloaded. The real configuration is made without memory, and its names and shapes
must pass the loader. The same configuration in small is loaded, scored, pruned, repaired, saved,
read again and exported, with random weights. The last rows are of the next open_clip: its blocks
are a stand-in (`next_open_clip`), as it is not released.
"""

import json
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import open_clip
import pandas as pd
import torch
import transformers
from next_open_clip import next_open_clip
from zoo import HF_REAL, WORDS, in_small, small_config

from mope_clip.clip import TOWERS, Clip, load_clip, prune, whole_spec
from mope_clip.clip.model import class_of
from mope_clip.clip.weights import load_strict
from mope_clip.clip.whole import at_hand
from mope_clip.data import synth_pairs
from mope_clip.evaluate import cost
from mope_clip.evaluate.recall import images_of
from mope_clip.metrics import mope
from mope_clip.metrics.mope import without_module
from mope_clip.pruners import export_onnx, repair

TABLE = Path(__file__).resolve().parent.parent / 'data' / 'families.csv'
COLUMNS = (
    'open_clip family model tag whole params gmacs vision text load repair save export'.split()
)
STAND_IN = 'next (stand-in)'  # in the column of open_clip's version
OF_THE_NEXT = ('ViT-B-32', 'openai'), ('coca_ViT-B-32', 'laion2b_s13b_b90k')
TIMM = dict(
    vit_base_mci='MobileCLIP ViT',
    vit_large_patch14_clip='MobileCLIP ViT',
    vit_pe='PE-Core',
    vit_='SigLIP',
    vitamin='ViTamin',
    eva='EVA',
    convnext='ConvNeXt',
    fastvit='FastViT',
)


def tags() -> list:  # of (model, tag)
    "Every pretrained tag, names that end in quickgelu among them"
    return open_clip.list_pretrained()


def family(name: str) -> str:
    "The family of a configuration of open_clip"
    cfg = open_clip.get_model_config(name)
    vision, text = cfg['vision_cfg'], cfg['text_cfg']
    timm = vision.get('timm_model_name', '')
    kind = next((told for start, told in TIMM.items() if timm.startswith(start)), 'ViT')
    if 'multimodal_cfg' in cfg:
        return 'CoCa'
    if isinstance(vision.get('layers'), list):
        return 'ResNet'
    if vision.get('pool_type') == 'avg':
        return 'CLIPA'
    return kind + (', Hugging Face text' if 'hf_model_name' in text else '')


def said(error: Exception) -> str:
    "The first line of what an error says"
    return str(error).splitlines()[0]


# ---- the real configuration, without memory


def real_text_configs(name, *args, **options):
    return HF_REAL[name]()


@cache
def real(name: str) -> dict:  # load, params, gmacs
    "Whether names and shapes of the real configuration pass the loader, and what it costs"
    cfg = open_clip.get_model_config(name)
    read = mock.patch.object(transformers.AutoConfig, 'from_pretrained', real_text_configs)
    with read, at_hand(cfg, None) as options, torch.device('meta'):
        options.pop('custom_text', None)
        model = class_of(cfg)(**options).eval()
        state = {k: x for k, x in model.state_dict().items() if not k.startswith('text_decoder.')}
        try:
            clip = Clip(model, None, None, dict(name=name, model_cfg=cfg))
            load_strict(clip.model, state, name)
        except ValueError as e:
            return dict(load=said(e))
    found = dict(load='yes', params=sum(p.numel() for p in clip.model.parameters()))
    if not clip.text.kept_whole:  # whose operations depend on values
        found['gmacs'] = round(cost(clip)['macs'] / 1e9, 2)
    return found


# ---- the same in small


def parts(clip: Clip, pairs, tower: str) -> str:
    "What of a tower can be scored and removed, and in which words the rest is refused"
    can, cannot = [], []
    for module, told in dict(head='heads', ffn='neurons', layer='layers').items():
        try:
            first = next(mope(clip, pairs, towers=tower, modules=module, groups=2).itertuples())
            without_module(clip, tower, first.layer, module, first.index, first.neurons)
            can.append(told)
        except ValueError as e:
            cannot.append(said(e))
    if clip.tower(tower).pooler is not None:
        can.append('pooler')
    return '; '.join([', '.join(can), *dict.fromkeys(cannot)]).strip('; ')


def cut(kept: dict, can: str):
    "Every other head and neuron goes, or a layer where only layers can"
    for layer in kept:
        if 'heads' in can:
            kept[layer]['heads'] = kept[layer]['heads'][layer % 2 :: 2]
        if 'neurons' in can:
            kept[layer]['neurons'] = kept[layer]['neurons'][::2]
    if can == 'layers':
        del kept[1]


@cache
def small(config_text: str, export: bool = True) -> dict:  # vision, text, repair, save, export
    "What a configuration in small can do, each step tried"
    config, pairs = json.loads(config_text), synth_pairs(6)
    with in_small(), tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        with at_hand(config['model_cfg'], None) as options:
            options.pop('custom_text', None)
            model = class_of(config['model_cfg'])(**options).eval()
        try:
            clip = Clip(model, WORDS.preprocess, WORDS.tokenizer, config)
        except ValueError as e:
            return dict(vision=said(e), text=said(e))
        found = {tower: parts(clip, pairs, tower) for tower in TOWERS}
        spec = whole_spec(clip)
        for tower in TOWERS:
            cut(getattr(spec, tower), found[tower].split(';')[0])
        pruned = prune(clip, spec)
        found['repair'] = repaired(pruned, clip)
        found['save'] = saved(pruned, Path(folder) / 'saved')
        if export:
            found['export'] = exported(pruned, Path(folder) / 'onnx')
    return found


@torch.no_grad()
def repaired(student: Clip, teacher: Clip) -> str:
    "Whether repair brings both towers nearer to the teacher, or in which words it is refused"
    pairs = synth_pairs(24, 'train')
    try:
        mended = repair(student, teacher, pairs, log=None)
    except ValueError as e:
        return said(e)
    images = images_of(teacher, pairs['image'])
    ids = teacher.tokenizer([captions[0] for captions in pairs['captions']])
    for tower, x in dict(vision=images, text=ids).items():
        before, after, aim = (clip.tower(tower)(x) for clip in (student, mended, teacher))
        if (after - aim).norm() > (before - aim).norm():
            return f'{tower} is no nearer'
    return 'yes'


@torch.no_grad()
def saved(clip: Clip, folder: Path) -> str:
    "Whether a saved model is the same function when it is read again"
    images, ids = clip.vision.noise(2), clip.text.noise(2)
    clip.save(folder)
    back = load_clip(folder, device='cpu')
    same = torch.equal(back.encode_image(images), clip.encode_image(images))
    same &= torch.equal(back.encode_text(ids), clip.encode_text(ids))
    return 'yes' if same else 'another function'


def exported(clip: Clip, folder: Path) -> str:
    "The towers that ONNX can hold, checked in onnxruntime, or what is said"
    done = []
    for tower in TOWERS:
        try:
            export_onnx(clip, folder, (tower,))
            done.append(tower)
        except Exception as e:  # whatever the exporter raises
            done.append(f'{tower}: {type(e).__name__}')
    return 'yes' if done == list(TOWERS) else '; '.join(done)


# ---- the table


def row(name: str, tag: str, export: bool = True) -> dict:
    "One line of the table"
    config = small_config(name)
    config['name'] = 'small'
    can = small(json.dumps(config, sort_keys=True), export)
    complete = [can[t].split(';')[0].startswith('heads, neurons, layers') for t in TOWERS]
    steps = [real(name)['load'], can.get('save')]
    whole = 'no'
    if all(complete) and steps == ['yes', 'yes']:
        whole = 'yes' if can['repair'] == 'yes' else 'all but repair'
    elif steps == ['yes', 'yes']:
        some = [t for t in TOWERS if 'layers' in can[t].split(';')[0]]
        whole = 'one tower' if len(some) == 1 else 'layers'
    about = dict(open_clip=open_clip.__version__, family=family(name), model=name, tag=tag)
    return {**about, 'whole': whole, **real(name), **can}


def row_of_next(name: str, tag: str, export: bool = True) -> dict:
    "One line of the table, with the blocks of the next open_clip"
    real.cache_clear()
    small.cache_clear()
    with next_open_clip():
        found = {**row(name, tag, export), 'open_clip': STAND_IN}
    real.cache_clear()
    small.cache_clear()
    return found


def main():
    warnings.simplefilter('ignore')
    rows = []
    for name, tag in tags():
        rows.append(row(name, tag))
        print(f'{name} {tag}: {rows[-1]["whole"]}', file=sys.stderr, flush=True)
    rows += [row_of_next(name, tag) for name, tag in OF_THE_NEXT]
    table = pd.DataFrame(rows)[COLUMNS]
    table.to_csv(TABLE, index=False)
    of_tags = table[table.open_clip != STAND_IN]
    print(of_tags.groupby(['whole', 'family']).size())
    print(of_tags.whole.value_counts())


if __name__ == '__main__':
    main()
