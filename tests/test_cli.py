"The command line: as a process, and command by command."

import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace

import pandas as pd
import pytest
from conftest import run
from PIL import Image
from samples import write_shard

from mope_clip.cli import COMMANDS, main
from mope_clip.cli.notebooks import value_of
from mope_clip.cli.registry import parser_for
from mope_clip.clip import load_clip, save_spec, tiny_clip, weights_hash
from mope_clip.data import synth_pairs
from mope_clip.data.parallel import World
from mope_clip.evaluate import cost, retrieval


def process(*args, **kw):
    "A command in a process of its own"
    return run(sys.executable, '-m', 'mope_clip.cli', *args, **kw)


def mope(*words):
    "Exit code, standard output and standard error of a command"
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            code = main(words)
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


# --- at once

HEAVY = 'torch', 'pandas', 'datasets', 'transformers', 'open_clip', 'numpy', 'mope_clip.clip'


@pytest.mark.parametrize('word', ['--help', '--version'])
def test_no_library_is_imported_to_say_what_there_is(word):
    r = run(sys.executable, '-X', 'importtime', '-m', 'mope_clip.cli', word)
    imported = {line.split('|')[-1].strip() for line in r.stderr.splitlines() if '|' in line}
    assert r.returncode == 0 and 'argparse' in imported
    assert not imported & set(HEAVY)


def test_the_package_itself_imports_no_library():
    r = run(sys.executable, '-X', 'importtime', '-c', 'import mope_clip')
    assert not any(re.search(rf'\| +{name}$', r.stderr, re.MULTILINE) for name in HEAVY)


def test_help_names_every_command():
    text = mope('--help')[1]
    names = (
        'run report index lessons readme score prune distill evaluate trim export repair search'
    ).split()
    assert list(COMMANDS) == names and all(name in text for name in names)


def test_the_version_is_said():
    from mope_clip import __version__

    assert mope('--version') == (0, f'mope_clip {__version__}\n', '')


# --- what is asked for


@pytest.mark.parametrize('name', ['score', 'prune', 'distill', 'evaluate', 'export'])
def test_a_command_of_the_pipeline_says_its_units_and_defaults(name):
    code, text, _ = mope(name, '--help')
    assert code == 0 and '--out' in text and 'default: ' in text
    assert 'default: None' not in text and 'default: False' not in text


def test_names_in_help_come_from_the_library():
    from mope_clip.metrics import HITS, METRICS, SMOOTH

    said = ' '.join(mope('score', '--help')[1].split())
    assert 'masks' in METRICS and ', '.join(METRICS) in said
    assert ', '.join((*HITS, *SMOOTH)) in said


def test_help_of_a_report_says_its_parameters():
    code, text, _ = mope('report', '--help')
    assert code == 0 and '-p NAME VALUE' in text and '--scale' in text and 'default: full' in text


@pytest.mark.parametrize(
    'line, sentence',
    [
        ('', 'the following arguments are required: command'),
        ('compress', "'compress'"),
        ('recheck', "'recheck'"),
        ('run 20_finetune -p task', 'expected 2 arguments'),
        ('report 20_finetune --all', 'argument --all: not allowed with argument name'),
        ('report', 'one of the arguments name --all is required'),
        ('prune small', 'one of the arguments --scores --spec is required'),
        ('score tiny --towers audio', "invalid choice: 'audio'"),
    ],
)
def test_wrong_usage_is_argparses(line, sentence):
    code, _, err = mope(*line.split())
    assert code == 2 and err.startswith('usage: mope') and sentence in err


def options_of(line):
    words = line.split()
    return parser_for(words[0]).parse_args(words)


def test_parameters_of_a_report_are_pairs_of_words():
    options = options_of('report 20_finetune -p task coco -p keep_width 0.5 --scale smoke')
    assert (options.command, options.name, options.scale) == ('report', '20_finetune', 'smoke')
    assert options.p == [['task', 'coco'], ['keep_width', '0.5']]
    assert options_of('run 20_finetune').p == []  # nothing is left of the call before


@pytest.mark.parametrize(
    'line, name',
    [
        ('report --scale smoke 20_finetune', '20_finetune'),
        ('report -p task coco 20_finetune', '20_finetune'),
        ('report --all', None),
    ],
)
def test_the_name_of_a_report_may_stand_anywhere(line, name):
    assert options_of(line).name == name


def test_options_of_a_plan_are_numbers():
    options = options_of('prune m --scores s --macs .5 --multiples 1 64 --rank global')
    assert (options.macs, options.multiples, options.rank) == (0.5, [1, 64], 'global')
    assert options.keep is None and options.dry_run is False


def test_a_model_and_pairs_are_named_alike_by_all_commands():
    options = options_of('evaluate ViT-B-32 --pretrained openai --images 12')
    assert (options.model, options.pretrained, options.images) == ('ViT-B-32', 'openai', 12)
    assert (options.task, options.split) == ('openmoji', 'test')


def test_the_batch_of_scoring_is_the_librarys_choice():
    assert options_of('score tiny').batch is None


@pytest.mark.parametrize(
    'text, value',
    [
        ('3', 3),
        ('0.5', 0.5),
        ('5e-4', 0.0005),
        ('true', True),
        ('[1, 2]', [1, 2]),
        ('"3"', '3'),
        ('openmoji', 'openmoji'),
        ('20_finetune', '20_finetune'),
        ('../data/coco', '../data/coco'),
        ('', ''),
    ],
)
def test_a_parameter_is_json_where_it_is_json(text, value):
    assert value_of(text) == value and type(value_of(text)) is type(value)


def test_whole_numbers_and_fractions_keep_their_type():
    assert type(value_of('3')) is int and type(value_of('3.0')) is float


# --- errors


def raising(error):
    def stop(*args, **kwargs):
        raise error

    return stop


@pytest.mark.parametrize(
    'error',
    [
        ValueError('keep is above 1.'),
        FileNotFoundError('coco is missing.'),
        ImportError('no resvg_py.'),
        RuntimeError('no memory.'),
        FloatingPointError('the loss is NaN.'),
    ],
)
def test_what_a_reader_can_put_right_is_one_sentence(error, monkeypatch):
    monkeypatch.setattr('mope_clip.report.runner.report', raising(error))
    assert mope('report', '20_finetune') == (1, '', f'mope: {error}\n')


@pytest.mark.parametrize(
    'line, advice, option',
    [
        ('score m', 'leave them out with `skip_unreadable=True`.', '--skip-unreadable.'),
        ('score m', 'or pass allow_test=True and', '--allow-test and'),
        ('evaluate m', 'pass pretrained=, one of a.', 'pass --pretrained, one of'),
        ('repair m', 'columns=dict(image=..., captions=...), and', '--columns \'{"image": ...,'),
        ('export m --format hf', 'or pass pad=True to fill', 'pass --pad to fill'),
        ('prune m --spec s', 'or lower keep_depth or', 'lower --keep-depth or'),
        ('run 20_finetune', 'columns=dict(image=...), and', '-p data_columns \'{"image": ...}\''),
        ('score m', 'as `root` (`-p data_root ...`).', 'as --data-root FOLDER.'),
        ('run 20_finetune', 'as `root` (`-p data_root ...`).', 'as -p data_root FOLDER.'),
        ('score m', "Unknown task 'data_root': choose", "Unknown task 'data_root': choose"),
        (
            'prune m --spec s',
            'there is no pad_to= and /a/keep_depth/b',
            'pad_to= and /a/keep_depth/b',
        ),
    ],
)
def test_advice_is_given_in_the_words_of_where_it_is_read(line, advice, option, monkeypatch):
    from mope_clip.cli.registry import COMMANDS

    name = line.split()[0]
    stopped = replace(COMMANDS[name], action=raising(ValueError(advice)))
    monkeypatch.setitem(COMMANDS, name, stopped)
    code, _, err = mope(*line.split())
    assert code == 1 and option in err


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr('mope_clip.report.runner.report', raising(ZeroDivisionError('a mistake')))
    with pytest.raises(ZeroDivisionError):
        mope('report', '20_finetune')


def test_an_unknown_notebook_is_refused_with_the_list():
    code, out, err = mope('report', 'no_such_notebook')
    assert (code, out, err.count('\n')) == (1, '', 1)
    assert err.startswith("mope: There is no notebook 'no_such_notebook': choose one of ")


# --- the pipeline, command by command, on coloured squares


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder with the tiny model, in which commands run; squares stand for every task"

    def load(task, split, n=None, **where):
        return synth_pairs(n, split)

    def stream(task, split, **where):
        return synth_pairs(16, split)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('mope_clip.data.load_pairs', load)
    monkeypatch.setattr('mope_clip.data.stream_pairs', stream)
    tiny_clip().save(tmp_path / 'tiny')
    return tmp_path


def done(line):
    "What a command that succeeds prints"
    code, out, err = mope(*line.split())
    assert code == 0, err
    return out


def refused(line):
    "The sentence with which a command is refused"
    code, _, err = mope(*line.split())
    assert code == 1 and err.count('\n') == 1, err
    return err


def loaded(place, name):
    return load_clip(str(place / name), device='cpu')


def test_scores_are_a_table_and_what_is_finished_stands_beside_it(place):
    out = done('score tiny --images 8 --groups 2 --modules head ffn layer --out s.parquet')
    assert out.endswith('35 modules scored by mope\nscores:  s.parquet\n')
    table = pd.read_parquet('s.parquet')
    assert (len(table), table.attrs['mope']['images']) == (5 * (4 + 2 + 1), 8)
    assert list((place / 's.parquet-run').rglob('*.parquet'))


def test_another_metric_takes_the_options_that_it_has(place):
    done('score tiny --metric magnitude --groups 2 --towers text --out m.parquet')
    table = pd.read_parquet('m.parquet')
    assert set(table.tower) == {'text'} and table.attrs['mope']['metric'] == 'magnitude'


def test_a_metric_that_looks_at_no_pairs_loads_none(place, monkeypatch):
    def no_pairs(*args, **options):
        raise FileNotFoundError('there is no data set here')

    monkeypatch.setattr('mope_clip.data.load_pairs', no_pairs)
    assert 'no data set' in refused('score tiny --images 8 --metric taylor --out t.parquet')
    assert '35 modules scored by magnitude' in done('score tiny --metric magnitude --groups 2')


def test_an_unknown_metric_or_z_is_refused_with_the_list(place):
    assert 'choose one of mope, ' in refused('score tiny --images 8 --metric hessian')
    assert 'choose one of mean_recall, ' in refused('score tiny --images 8 --z recall')


@pytest.fixture
def scored(place):
    done('score tiny --images 8 --groups 2 --out s.parquet')
    return place


def test_a_dry_run_says_the_cost_and_writes_nothing(scored):
    out = done('prune tiny --scores s.parquet --keep .5 --keep-depth .67 --dry-run --out small')
    assert 'vision: 2 of 3 layers' in out and out.endswith('nothing was removed\n')
    assert not (scored / 'small').exists()


def test_every_option_reaches_the_planner(scored):
    done(
        'prune tiny --scores s.parquet --params 40000 --no-embeddings --rank global --floor 0 '
        '--multiples 1 8 --out small'
    )
    small = loaded(scored, 'small')
    made = small.spec.provenance['plan']
    assert made == dict(
        budget=dict(params=40000.0),
        share=made['share'],
        keep_depth=1.0,
        rank='global',
        floor=0,
        multiples=[1, 8],
        embeddings=False,
    )
    costs = cost(small)
    assert costs['vision_params'] + costs['text_params_no_embedding'] <= 40_000


@pytest.fixture
def pruned(scored):
    done('prune tiny --scores s.parquet --keep .5 --rank global --out small')
    save_spec(loaded(scored, 'small').spec, scored / 'spec.json')
    return scored


def test_a_pruned_model_is_repaired_and_a_budget_is_searched(pruned):
    said = done('repair small --teacher tiny --images 20 --out mended')
    assert said.splitlines()[-1] == 'model:   mended' and 'maps solved' in said
    mended = load_clip(pruned / 'mended', device='cpu')
    assert mended.spec.provenance['repair']['items']['vision'] == 20
    line = 'search tiny --scores s.parquet --macs .5 --images 20 --calibration-images 20'
    said = done(f'{line} --evaluations 3 --out found')
    assert said.splitlines()[-2:] == ['spec:    found.json', 'model:   found']
    found = load_clip(pruned / 'found', device='cpu')
    assert cost(found)['macs'] <= 0.5 * cost(load_clip(pruned / 'tiny', device='cpu'))['macs']
    assert 'exactly one budget' in refused('search tiny --scores s.parquet --out other')


def test_a_table_of_layers_alone_plans_depth(place):
    done('score tiny --images 8 --modules layer --out layers.parquet')
    done('prune tiny --scores layers.parquet --keep-depth .5 --out shallow')
    assert [len(load_clip('shallow').tower(t).blocks) for t in ('vision', 'text')] == [2, 1]
    assert 'layers alone' in refused('prune tiny --scores layers.parquet --macs .5 --out other')
    assert 'give --keep-depth below 1' in refused('prune tiny --scores layers.parquet')


def test_a_specification_makes_the_same_model(pruned):
    assert 'in all:' in done('prune tiny --spec spec.json --out again')
    hashes = {weights_hash(loaded(pruned, name)) for name in ('small', 'again')}
    assert len(hashes) == 1


def test_scores_of_another_model_are_noted(pruned, monkeypatch):
    other = tiny_clip(seed=1)
    other.save(pruned / 'other')
    out = done('prune other --scores s.parquet --keep .5 --dry-run')
    assert 'these scores are of a model with other weights' in out


@pytest.mark.parametrize(
    'line, sentence',
    [
        ('prune tiny --scores none.parquet --keep .5', 'make it with `mope score`'),
        (
            'prune tiny --spec spec.json --keep-depth .5 --rank global',
            'leave out --keep-depth, --rank',
        ),
        ('prune tiny --spec spec.json --multiples 1 8', 'leave out --multiples'),
        ('prune tiny --spec spec.json --no-embeddings', 'leave out --no-embeddings'),
        ('prune tiny --spec spec.json --out tiny', 'is the model itself'),
        ('prune local-dir:tiny --spec spec.json --out tiny', 'is the model itself'),
        ('prune tiny --pretrained other.pt --spec spec.json', 'has weights of its own'),
        ('distill small --teacher tiny --out small', '--out is the model itself'),
        ('distill small --teacher tiny --out tiny', '--out is the teacher itself'),
        (
            'distill small --teacher tiny --teacher-pretrained laion2b',
            '--teacher-pretrained laion2b would not be read',
        ),
        ('evaluate small --no-retrieval --latency 1 0', 'from 1 on, and not 0'),
        ('export small --format onnx --out small', 'is the model itself'),
        ('export small --format hf', 'or pass --pad to fill'),
        ('export small --format onnx --pad', 'ONNX has room'),
        ('export small --format hf --opset 23', '--opset is for ONNX'),
        ('export small --format onnx --opset 9', 'the exporter writes 18 to 24'),
        ('export small --format hf --data-root x --images 7', '--data-root and --images are for'),
        ('export small --format onnx --images 7', 'without --task: leave out --images'),
        ('trim tiny --texts words.txt --task coco', 'those of --texts: leave out --task'),
        ('score tiny --batch 0', '--batch is a whole number from 1 on, not 0'),
        ('distill small --batch 0', '--batch is a whole number from 1 on, not 0'),
        ('repair small --batch -1', '--batch is a whole number from 1 on, not -1'),
        ('evaluate small --batch 0', '--batch is a whole number from 1 on, not 0'),
        ('evaluate small --no-retrieval --images -4', '--images is a whole number from 1 on'),
        ('evaluate small --no-retrieval --columns {}', 'looked at: leave out --columns'),
        ('search tiny --calibration-images 0 --scores s.parquet', '--calibration-images is a'),
        (
            'search tiny --scores s.parquet --macs .5 --calibration-images 5',
            'Repair needs at least 10 images',
        ),
        (
            'search tiny --scores s.parquet --macs .5 --calibration-split test',
            'reported on the split test: search on --split validation',
        ),
        ('search tiny --scores s.parquet --macs .5 --split test', 'reported on the split test'),
        ('distill small --teacher tiny --split test', 'learn from --split train'),
        ('repair small --teacher tiny --split final', 'repair on --split train'),
        ('score tiny --split test', 'or pass --allow-test'),
        ('score tiny --metric hessian', 'choose one of mope, '),
        (
            'score tiny --metric magnitude --z nonsense --modules head --images 7',
            'mean nothing to the metric magnitude: leave out --z, --modules, --images.',
        ),
        ('repair small --teacher-pretrained openai', 'without --teacher: name both'),
        ('distill small --teacher-pretrained openai', 'without --teacher: name both'),
        ('evaluate small --data-root ~/photos', '--data-root would not be read for openmoji'),
        (
            'evaluate small --no-retrieval --suites colour --data-root x',
            'found by their names: leave out --data-root',
        ),
        ('score tiny --columns {}x', '--columns would not be read for openmoji'),
        ('trim tiny --data-root photos', '--data-root would not be read for openmoji'),
        ('distill small --teacher tiny --data-root /a/b', 'name a set of your own by its place'),
        ('evaluate small --task ./tiny --data-root small', './tiny and --data-root small are two'),
        ('prune tiny --scores s.parquet --macs 30', '--macs is a share up to 1, or a whole number'),
        ('search tiny --scores s.parquet --params 12.5', '12.5 % is 0.125'),
        ('prune tiny --scores s.parquet --latency inf', '--latency is inf: give a number'),
        ('score tiny --memory nan', '--memory is nan: give a number'),
        ('repair small --memory -5', '--memory is -5.0: give a number'),
        ('prune tiny --scores s.parquet --keep .5 --floor 2', 'of each: leave out --floor'),
        ('prune tiny --scores s.parquet --keep .5 --no-embeddings', 'leave out --no-embeddings'),
        (
            'prune tiny --scores s.parquet --keep-depth .5 --rank global --multiples 1 8',
            'only layers go: leave out --rank, --multiples',
        ),
        ('search tiny --scores s.parquet --macs .5 --no-embeddings', 'leave out --no-embeddings'),
        ('repair tiny --teacher small', 'name the model that was pruned as --teacher'),
        ('score tiny --images 8 --out spec', 'spec-run is a file'),
        ('repair small --teacher tiny --out spec', 'spec-run is a file'),
        ('distill small --teacher tiny --out spec', 'spec-run is a file'),
        ('search tiny --scores s.parquet --macs .5 --out spec', 'spec-run is a file'),
        ('prune tiny --spec spec.json --out caf\udce9', 'is no text in UTF-8'),
    ],
)
def test_what_would_go_wrong_is_refused_before_the_work(line, sentence, pruned):
    (pruned / 'spec-run').write_text('mine')
    assert sentence in refused(line)
    assert (pruned / 'spec-run').read_text() == 'mine'


@pytest.mark.parametrize(
    'words, name',
    [
        (['trim', 'tiny', '--texts', ''], '--texts'),
        (['prune', 'tiny', '--spec', '', '--keep', '.5'], '--spec'),
        (['score', 'tiny', '--out', ''], '--out'),
        (['evaluate', 'tiny', '--task', ''], '--task'),
        (['evaluate', 'tiny', '--suites', 'concept', ''], '--suites'),
        (['repair', 'small', '--teacher', ''], '--teacher'),
        (['evaluate', ''], 'model'),
        (['run', ''], 'name'),
    ],
)
def test_an_empty_value_is_refused_by_name(words, name, place):
    code, _, err = mope(*words)
    assert (code, err) == (1, f'mope: {name} is empty: give it a value, or leave it out.\n')
    assert [path.name for path in place.iterdir()] == ['tiny']  # nothing was written


@pytest.mark.parametrize('content', ['', '{"levels": [1, 2', '{}', '[]'])
def test_a_damaged_search_is_named(content, scored):
    (scored / 'found-run').mkdir()
    (scored / 'found-run' / 'search-0123.json').write_text(content)
    line = 'search tiny --scores s.parquet --macs .5 --images 20 --out found'
    assert 'search-0123.json is damaged: delete it, and the search begins' in refused(line)


@pytest.mark.parametrize('option', ['--latency', '--suites'])
def test_a_list_of_nothing_is_wrong_usage(option):
    code, _, err = mope('evaluate', 'tiny', option)
    assert code == 2 and 'expected at least one argument' in err


def test_a_specification_of_another_model_is_noted(pruned):
    note = 'note: this specification was made for a model with other weights'
    assert note not in done('prune tiny --spec spec.json --dry-run')
    tiny_clip(seed=1).save(pruned / 'other')
    assert note in done('prune other --spec spec.json --dry-run')


def test_that_nothing_was_removed_is_noted(place):
    note = 'note: the model has all that its teacher has'
    assert note in done('repair tiny --teacher tiny --images 20 --out same')
    assert weights_hash(loaded(place, 'same')) == weights_hash(loaded(place, 'tiny'))


def test_letters_that_a_terminal_lacks_are_spelled(place, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding='ascii'))
    assert main(['score', 'tiny', '--metric', 'magnitude', '--out', 'caf\u00e9']) == 0
    sys.stdout.flush()
    assert b'scores:  caf\\xe9' in sys.stdout.buffer.getvalue()


@pytest.mark.parametrize(
    'line, out',
    [
        ('score tiny --metric magnitude', 'tiny/model.safetensors'),
        ('evaluate tiny --no-retrieval', 'tiny/config.json'),
        ('search tiny --scores s.parquet --macs .5', 'notes'),
    ],
)
def test_a_file_that_another_has_written_is_not_overwritten(line, out, scored):
    (scored / 'notes.json').write_text('{"mine": 1}')
    file = scored / ('notes.json' if out == 'notes' else out)
    before = file.read_bytes()
    assert 'was not written by this command' in refused(f'{line} --out {out}')
    assert file.read_bytes() == before


def test_a_file_of_the_same_command_is_replaced(place):
    for line in (
        'score tiny --metric magnitude --out m.parquet',
        'evaluate tiny --images 8 --out n',
    ):
        done(line), done(line)
    (place / 'odd.json').mkdir()
    search = 'search tiny --scores m.parquet --macs .5'
    assert 'odd.json cannot be written (it is a folder)' in refused(f'{search} --out odd')


def test_what_is_kept_of_scoring_is_in_nobodys_way(place):
    tiny_clip().save(place / 'm')
    before = sorted(path.name for path in (place / 'm').iterdir())
    for out in ('m.parquet', 'table'):  # beside a model of the same name, and without an ending
        done(f'score m --images 8 --groups 2 --out {out}')
        assert len(pd.read_parquet(place / out)) and (place / f'{out}-run').is_dir()
    assert sorted(path.name for path in (place / 'm').iterdir()) == before


def test_a_metric_without_a_batch_of_ones_choice_takes_its_own(place, monkeypatch):
    asked = []

    def score_by(metric, clip, pairs, **options):
        asked.append(options)
        return pd.DataFrame(dict(score=[1.0]))

    monkeypatch.setattr('mope_clip.metrics.score_by', score_by)
    done('score tiny --metric masks --images 8')
    done('score tiny --metric masks --images 8 --batch 4 --out other.parquet')
    assert [options.get('batch') for options in asked] == [None, 4] and 'batch' not in asked[0]


def test_what_is_kept_lies_beside_a_result_however_it_is_written(tmp_path, monkeypatch):
    from mope_clip.cli.registry import beside

    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert beside('~/out', '-run') == tmp_path / 'out-run'
    assert beside('.', '-run') == tmp_path.with_name(f'{tmp_path.name}-run')
    assert beside('a/..', '-run').name == f'{tmp_path.name}-run'


def test_recovery_keeps_its_checkpoints_at_home(pruned, monkeypatch):
    monkeypatch.setenv('HOME', str(pruned / 'home'))
    done(f'{DISTILL}=~/student')
    assert sorted(path.name for path in (pruned / 'home').iterdir()) == ['student', 'student-run']


def test_a_corpus_is_looked_at_before_it_is_learned_from(tmp_path, monkeypatch):
    monkeypatch.setenv('MOPE_CLIP_DATA', str(tmp_path))
    assert 'cc3m is not there. cc3m: fetch' in refused('distill no-model --task cc3m')
    (tmp_path / 'cc3m').mkdir()
    write_shard(tmp_path / 'cc3m' / '00000.tar', [1, 2])
    assert "Unknown model 'no-model'" in refused('distill no-model --task cc3m')


def test_a_table_that_is_none_is_refused(place):
    pd.DataFrame(dict(tower=['vision'])).to_parquet('odd.parquet')
    assert 'is no table of scores, it lacks index' in refused('prune tiny --scores odd.parquet')


DISTILL = 'distill small --teacher tiny --pairs-seen 16 --batch 8 --seed 3 --out'


def test_recovery_goes_on_from_where_it_was_stopped(pruned):
    out = done(f'{DISTILL} student')
    student, small = loaded(pruned, 'student'), loaded(pruned, 'small')
    assert student.spec == small.spec and weights_hash(student) != weights_hash(small)
    assert '16 of 16 pairs' in out
    assert 'resumed at step 2 of 2' in done(f'{DISTILL} student')


def test_losses_and_optimizer_are_options_of_recovery(pruned):
    ways = '', '--losses published', '--optimizer muon'
    for number, way in enumerate(ways):
        done(f'{DISTILL} student-{number} {way}')
    students = [loaded(pruned, f'student-{number}') for number in range(len(ways))]
    assert len({weights_hash(student) for student in students}) == len(ways)


def test_of_several_processes_the_first_writes_the_model(pruned, monkeypatch):
    second = World(rank=1, size=2)
    monkeypatch.setattr('mope_clip.data.parallel.processes', lambda device: second)
    done(f'{DISTILL} other')
    assert not (pruned / 'other').exists()


def test_numbers_are_for_the_eye_and_for_a_program(pruned):
    out = done('evaluate small --images 8 --latency 1 --out numbers.json')
    numbers, small = json.loads((pruned / 'numbers.json').read_text()), loaded(pruned, 'small')
    recall = 'retrieval openmoji test'
    assert list(numbers) == ['model', 'weights', recall, 'cost', 'latency, batch 1']
    assert numbers['cost'] == cost(small) and numbers['weights'] == weights_hash(small)
    assert numbers[recall] == retrieval(small, synth_pairs(8, 'test'))
    assert 'mean_recall' in out


def test_a_suite_may_be_a_folder_of_ones_own(place):
    for name, colour in (('cat', 'red'), ('dog', 'blue')):
        (place / 'pets' / name).mkdir(parents=True)
        Image.new('RGB', (40, 40), colour).save(place / 'pets' / name / '1.png')
    (place / 'pets' / 'dog' / '2.png').write_bytes(b'no picture')
    line = 'evaluate tiny --no-retrieval --images 4'
    for suite in ('pets', './pets', str(place / 'pets')):
        assert '--skip-unreadable' in refused(f'{line} --suites {suite}')
        assert 'zero-shot' in done(f'{line} --skip-unreadable --suites {suite}')


def test_recall_may_be_left_out(place):
    assert 'retrieval' not in done('evaluate tiny --no-retrieval')


def test_a_plain_folder_is_written_with_padding(pruned):
    assert done('export small --format open_clip --pad --out plain') == 'open_clip:   plain\n'
    assert (pruned / 'plain' / 'open_clip_config.json').is_file()


# --- notebooks


@pytest.fixture
def asked(monkeypatch, tmp_path):
    "A stand-in for running a notebook, and what it was asked for"
    asked = []

    def stand_in(name, out, parameters, stdout):
        asked.append((name, out, parameters))
        print('recall 61.5\nmodel: here', file=stdout)
        return out

    monkeypatch.setattr('mope_clip.report.runner.run_notebook', stand_in)
    return asked


def test_a_run_says_its_place_first_and_its_headline_last(asked, tmp_path, monkeypatch):
    monkeypatch.setattr('mope_clip.report.runner.scale_parameters', lambda name, scale: {})
    monkeypatch.setattr('mope_clip.report.templates.check_clone', lambda: tmp_path)
    lines = done('run 20_finetune -p task coco').splitlines()
    place = tmp_path / 'runs' / '20_finetune-coco' / '20_finetune.ipynb'
    assert lines[0] == f'Running 20_finetune; the executed notebook will be {place}'
    assert lines[1:] == ['recall 61.5', 'model: here', f'report:  {place}']
    done('run 20_finetune')
    assert asked[-1][1] == tmp_path / 'runs' / '20_finetune-openmoji' / '20_finetune.ipynb'
    done(f'run 20_finetune -p out_dir {tmp_path}/mine')
    assert asked[-1][1] == tmp_path / 'mine' / '20_finetune.ipynb'


def test_a_scale_is_a_section_of_the_notebooks_yaml(asked, tmp_path):
    line = f'run 20_finetune -p out_dir {tmp_path}/mine -p batch 32'
    assert 'recall 61.5' in done(line) and asked[-1][2]['batch'] == 32
    done(f'{line} --scale coco')  # and what is given beside it
    assert [asked[-1][2][name] for name in ('task', 'lr', 'batch')] == ['coco', 2e-5, 32]
    assert "has no scale 'huge'" in refused(f'{line} --scale huge')


@pytest.fixture
def called(monkeypatch):
    "Functions that write reports and pages, replaced by notes of how they were called"
    called = []

    def note(place, name, value='the/path'):
        def call(*args, **options):
            called.append((name, *args, *options.items()))
            return value

        monkeypatch.setattr(f'mope_clip.report.{place}.{name}', call)

    note('runner', 'report')
    note('runner', 'keep_outputs')
    note('runner', 'report_all', {})
    note('site', 'write_index')
    note('site', 'write_page')
    note('readme', 'write_readme')
    return called


def test_a_report_at_full_size_is_written_with_the_page(called):
    assert done('report 20_finetune -p keep_width 0.25') == 'the/path\n'
    assert called == [('report', '20_finetune', 'full', ('keep_width', 0.25)), ('write_page',)]


def test_a_smaller_report_leaves_the_page(called):
    done('report 20_finetune --scale smoke')
    assert called == [('report', '20_finetune', 'smoke')]


def test_all_reports_end_in_the_page(called):
    assert done('report --all').rstrip().endswith('index.html') and called == [('report_all',)]


@pytest.mark.parametrize('odd', ['--scale smoke', '-p task coco'])
def test_all_reports_are_made_by_their_defaults(odd, called):
    assert 'leave out --scale and -p' in refused(f'report --all {odd}')


def test_reports_that_failed_are_named_at_the_end(called, monkeypatch):
    failed = {'40': 'no data', '41': 'no model'}
    monkeypatch.setattr('mope_clip.report.runner.report_all', lambda: failed)
    said = refused('report --all')
    assert '2 failed: 40 (no data); 41 (no model). The same command' in said


@pytest.mark.parametrize(
    'line, calls',
    [
        ('index', [('write_index',), ('write_page',)]),
        ('readme', [('write_readme', False)]),
        ('readme --check', [('write_readme', True)]),
        ('lessons 01n_pairs', [('keep_outputs', '01n_pairs')]),
    ],
)
def test_what_is_generated_is_written_by_the_library(line, calls, called):
    assert done(line) == 'the/path\n' * len(calls) and called == calls


# --- as a process


def test_bad_parameter_is_refused_before_a_kernel_starts(tmp_path):
    r = process('run', '20_finetune', '-p', 'keep_widht', '0.5', '-p', 'out_dir', tmp_path / 'run')
    assert r.returncode == 1 and "did you mean 'keep_width'" in r.stderr
    assert 'Traceback' not in r.stderr and not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'line, sentence',
    [
        ('run 60_your_model -p QUERIES ["a"]', "Unknown parameter 'QUERIES': the parameters are"),
        ('run 30_pretrain -p tasks 5', 'tasks must be of type list'),
        ('report 20_finetune -p out_dir mine', 'leave out out_dir, or run the notebook with'),
        ('run 72_how_long -p budgets ["half"]', "holds 'half', but must hold items of type float"),
        ('run 46_cost -p batches ["one"]', "holds 'one', but must hold items of type int, such as"),
        ('run 30_pretrain -p tasks [null]', 'holds None, but must hold items of type str'),
        ('run 20_finetune -p data_root /no/such', 'data_root would not be read for openmoji'),
        ('run 20_finetune -p data_columns {"image":"x"}', 'data_columns would not be read for'),
        ('run 20_finetune -p task /a/b -p data_root /c', '/a/b and data_root /c are two places'),
        ('lessons 01a_progress nosuch', "There is no library notebook 'nosuch'"),
    ],
)
def test_parameters_are_checked_before_anything_is_done(line, sentence):
    assert sentence in refused(line)


@pytest.mark.parametrize('command', ['run', 'report'])
@pytest.mark.parametrize(
    'name', ['{nbs}/55_gpu', '../nbs/55_gpu', 'nbs/55_gpu.ipynb', '55_gpu.ipynb']
)
def test_a_notebook_is_named_without_its_folder_and_ending(command, name, root, monkeypatch):
    monkeypatch.setattr('papermill.execute_notebook', raising(AssertionError('it was run')))
    notebook = root / 'nbs' / '55_gpu.ipynb'
    before = notebook.read_bytes()
    assert 'ending: call it 55_gpu.' in refused(f'{command} {name.format(nbs=root / "nbs")}')
    assert notebook.read_bytes() == before


def test_a_text_stays_as_it_was_typed():
    from mope_clip.cli.notebooks import parameters_of

    line = 'run 20_finetune -p task 2024.10 -p pretrained 1e5 -p lr_finetune 1e-4 -p seed 1'
    options = options_of(line.replace(' -p lr_finetune 1e-4', ''))
    assert parameters_of(options) == dict(task='2024.10', pretrained='1e5', seed=1)


def test_error_inside_a_notebook_is_one_sentence(tmp_path):
    r = process('run', '20_finetune', '-p', 'keep_depth', '0', '-p', 'out_dir', tmp_path / 'run')
    assert r.returncode == 1 and 'above 0 and at most 1, not 0' in r.stderr
    assert 'Traceback' not in r.stderr


def test_generated_files_are_checked():
    assert process('readme', '--check').returncode == 0


def test_the_pipeline_from_end_to_end(tmp_path):
    "Each command writes what the next one reads; what is finished is not done again"
    tiny_clip().save(tmp_path / 'tiny')

    def do(line):
        r = process(*line.split(), cwd=tmp_path, fresh=False)
        assert r.returncode == 0, r.stderr[-2000:]
        return r.stdout

    score = 'score tiny --images 12 --groups 4 --out scores.parquet'
    assert '45 modules scored by mope' in do(score)
    table = pd.read_parquet(tmp_path / 'scores.parquet')
    assert len(table) == 5 * (4 + 4 + 1)
    assert (table.attrs['mope']['split'], table.attrs['mope']['images']) == ('validation', 12)
    kept = sorted((tmp_path / 'scores.parquet-run').rglob('*.parquet'))
    before = [path.stat().st_mtime_ns for path in kept]
    do(score)  # taken from the store
    assert before and before == [path.stat().st_mtime_ns for path in kept]
    prune = 'prune tiny --scores scores.parquet --macs 0.5 --rank global'
    dry = do(f'{prune} --dry-run')
    assert 'nothing was removed' in dry and not (tmp_path / 'pruned').exists()
    assert dry.splitlines()[:3] == do(f'{prune} --out small').splitlines()[:3]
    dense, small = (cost(load_clip(str(tmp_path / name))) for name in ('tiny', 'small'))
    assert small['macs'] <= 0.5 * dense['macs'] + dense['macs'] * 0.001
    distill = 'distill small --teacher tiny --pairs-seen 32 --batch 16 --out student'
    do(distill)
    assert 'resumed at step 2 of 2' in do(distill)
    said = do('evaluate student --images 12 --suites colour --out numbers.json')
    numbers = json.loads((tmp_path / 'numbers.json').read_text())
    assert 'mean_recall' in said and 'by hand' not in said
    assert numbers['cost']['macs'] == small['macs']
    assert 'top1' in numbers['zero-shot colour test']
    do('export student --format open_clip --pad --out plain')
    assert (tmp_path / 'plain' / 'open_clip_config.json').is_file()


@pytest.mark.parametrize(
    'line, sentence',
    [
        ('score no/such', 'There is no folder no/such'),
        ('prune tiny --scores none.parquet --keep .5', 'There is no table none.parquet'),
        ('prune tiny --spec none.json', 'There is no file none.json'),
        ('evaluate tiny --task flicker', "Unknown task 'flicker'"),
        ('export tiny --format onnx --pad', '--pad is for open_clip and hf'),
    ],
)
def test_bad_arguments_are_one_sentence(line, sentence, tmp_path):
    if ' tiny' in line:
        tiny_clip().save(tmp_path / 'tiny')
    r = process(*line.split(), cwd=tmp_path, fresh=False)
    assert r.returncode == 1 and sentence in r.stderr and r.stderr.count('\n') == 1, r.stderr


# --- to where it is used


def test_words_are_trimmed_by_a_file_or_by_captions(place):
    (place / 'words.txt').write_text('\ufeffa red square\n\n  a blue square \n', encoding='utf-8')
    said = done('trim tiny --texts words.txt --out few')
    assert said.splitlines()[0].startswith('vocabulary: 7 of 12 tokens; the 2 texts are read')
    assert said.splitlines()[-1] == 'model:   few'
    few = load_clip(place / 'few', device='cpu')
    assert len(few.spec.vocabulary) == len(few.text.token_table) == 7
    said = done('trim tiny --images 8 --out captions')
    assert 'texts are read as before' in said


@pytest.mark.parametrize(
    'line, sentence',
    [
        ('trim tiny --texts none.txt', 'There is no file none.txt: --texts is a file with a text'),
        ('trim tiny --texts empty.txt', 'There are no texts to keep the tokens of'),
        ('trim tiny --texts latin.txt', 'latin.txt is no text in UTF-8: convert it'),
        ('trim tiny --texts empty.txt --out tiny', '--out is the model itself'),
        ('export tiny --format onnx --weights int4', 'weights are fp32, fp16 or int8'),
        ('export tiny --format onnx --batch 0', 'batch is a whole number from 1 on'),
        ('export tiny --format hf --weights int8', '--weights is for ONNX: leave it out'),
        ('export tiny --format hf --batch 2 --force', '--batch and --force are for ONNX'),
        ('prune tiny --spec spec.json --servable', 'leave out --servable'),
        (
            'prune tiny --scores s.parquet --keep .5 --servable --rank global',
            "leave rank at 'layer'",
        ),
    ],
)
def test_what_cannot_be_served_is_one_sentence(line, sentence, pruned):
    (pruned / 'empty.txt').write_text('\n')
    (pruned / 'latin.txt').write_bytes('naïve'.encode('latin-1'))
    assert sentence in refused(line)


def test_rounded_weights_are_judged_on_a_task(place):
    said = done('export tiny --format onnx --weights int8 --task openmoji --images 8 --out served')
    assert 'ONNX with weights int8: cosine to the model in single precision on 8 images' in said
    assert 'mean recall' in said and said.splitlines()[-1] == 'onnx:   served'
    told = json.loads((place / 'served/check.json').read_text())
    assert told['verdict'] == 'good' and told['items']['images'] == 8


def test_a_servable_plan_keeps_all_heads(scored):
    done('prune tiny --scores s.parquet --macs .7 --servable --out even')
    even = load_clip(scored / 'even', device='cpu')
    assert all(block.heads == 4 for block in even.vision.blocks)
    assert done('export even --format hf --out plain') == 'hf:   plain\n'
