"A report: its two files, what a run is refused for, what it measures, and how it is stored."

import json
import re
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import ROOT
from toy import code, prose, row, write_notebook, write_results

MINUS = '\N{MINUS SIGN}'

# ---------------------------------------------------------------- the folder of a run


def test_the_folder_of_a_run_lies_in_the_repository(toy_repo):
    from mope_clip.report.parameters import run_dir
    from mope_clip.report.templates import repo_root

    assert repo_root() == toy_repo
    assert run_dir('20_finetune', 'coco') == toy_repo / 'runs' / '20_finetune-coco'


def test_a_chosen_folder_is_made_and_left_empty(toy_repo):
    from mope_clip.report.parameters import run_dir

    mine = run_dir('20_finetune', 'coco', str(toy_repo / 'a' / 'b'))
    assert mine == toy_repo / 'a' / 'b' and list(mine.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(toy_repo):
    from mope_clip.report.parameters import run_dir

    with pytest.raises(ValueError, match='choose another folder with -p out_dir'):
        run_dir('20_finetune', 'coco', str(toy_repo / 'settings.ini' / 'below'))


def test_a_finished_run_is_not_overwritten_by_one_with_other_parameters(toy_repo):
    from mope_clip.report.parameters import run_dir

    done = run_dir('20_finetune', 'coco') / 'results.json'
    done.write_text(json.dumps(dict(parameters=dict(keep=0.5, out_dir='x'))), encoding='utf-8')
    run_dir('20_finetune', 'coco', parameters=dict(keep=0.5, out_dir=''))  # the same run goes on
    with pytest.raises(ValueError, match=r'finished run with keep 0.5, which this one would overw'):
        run_dir('20_finetune', 'coco', parameters=dict(keep=0.25, out_dir=''))


def test_outside_a_repository_a_run_lies_where_the_reader_is(toy_repo):
    from mope_clip.report.templates import repo_root

    (toy_repo / 'settings.ini').unlink()
    assert repo_root() == Path.cwd()


# ---------------------------------------------------------------- parameters


GOOD = dict(__annotations__=dict(task=str, keep=float), task='coco', keep=1, In=[], TOWERS=('a',))


def test_what_is_no_setting_is_no_parameter():
    from mope_clip.report.parameters import check_parameters

    space = {**GOOD, 'function': print, '_private': 3}
    assert check_parameters(space) == dict(task='coco', keep=1)


@pytest.mark.parametrize(
    'wrong, sentence',
    [
        (
            dict(tsk='coco'),
            "Unknown parameter 'tsk', did you mean 'task'? The parameters are task, keep.",
        ),
        (dict(gpu_memory=8), "Unknown parameter 'gpu_memory'? The parameters are task, keep."),
        (dict(keep=True), 'Parameter keep must be of type float, not True.'),
        (dict(keep='half'), "Parameter keep must be of type float, not 'half'."),
        (dict(task=None), 'Parameter task must be of type str, not None.'),
    ],
)
def test_a_wrong_parameter_is_one_sentence(wrong, sentence):
    from mope_clip.report.parameters import check_parameters

    with pytest.raises(ValueError) as e:
        check_parameters({**GOOD, **wrong})
    assert str(e.value) == sentence


def test_a_notebook_that_is_run_again_may_find_what_its_later_cells_have_left():
    from mope_clip.report.parameters import check_parameters

    report, later = 'report = Report(globals())', 'data = dict(a=1)\nfor n in (1, 2):\n    pass'
    space = {**GOOD, 'data': {}, 'n': 2}
    check_parameters({**space, '_ih': ['', 'keep: float = 1', report, later, '%magic', report]})
    for executed in ([''], ['', later, report]):  # as papermill puts it before the report
        with pytest.raises(ValueError, match="Unknown parameter 'data'"):
            check_parameters({**space, '_ih': executed})


def test_types_are_those_of_numbers_and_not_of_truth():
    from mope_clip.report.parameters import fits

    pairs = (1, float), (True, float), (1.0, int), (True, int), (True, bool)
    assert [fits(*pair) for pair in pairs] == [True, False, False, False, True]


def test_choices_and_counts_are_refused_by_name():
    from mope_clip.report.parameters import check_choice, check_positive

    check_choice('tower', 'both', ('both', 'vision'))
    check_positive('groups', 1)
    with pytest.raises(ValueError, match="Parameter tower is 'image', but must be one of 'both'"):
        check_choice('tower', 'image', ('both', 'vision'))
    with pytest.raises(ValueError, match=r"Parameter sizes \(huge\) is 'huge', but must be one"):
        check_choice('sizes', ['half', 'huge'], ('half',))
    with pytest.raises(ValueError, match=r'Parameter batch is 0, but must be at least 1.'):
        check_positive('batch', 0)


# ---------------------------------------------------------------- the two files of a report


def test_adding_a_report_touches_its_notebook_and_its_yaml_file_alone(toy_repo):
    from mope_clip.report.readme import evidence
    from mope_clip.report.templates import Template, template_names

    (toy_repo / 'nbs' / 'claims.yaml').write_text(
        '3: {claim: It rates., short: Rates.}\n', encoding='utf-8'
    )
    write_notebook(toy_repo / 'nbs' / '90_new.ipynb', prose('# New\n> Whether.'))
    (toy_repo / 'nbs' / '90_new.yaml').write_text(
        "claims: {3: ['*']}\nrules:\n  'above-{other}': {says: 'above {other}, {seeds} seeds'}\n"
        'smoke: {seeds: 1}\n',
        encoding='utf-8',
    )
    new = Template('90_new')
    assert template_names() == ['90_new'] and evidence(3, ['90_new']) == {'90_new': ['*']}
    assert new.rule('above-taylor', dict(seeds=5)).says == 'above taylor, 5 seeds'
    assert new.scales == dict(full={}, smoke=dict(seeds=1))


def test_a_rule_with_the_very_id_comes_before_one_with_names(toy_repo):
    from mope_clip.report.templates import Template

    (toy_repo / 'nbs' / '90_new.yaml').write_text(
        "rules:\n  'above-{other}': {says: 'any {other}'}\n"
        '  above-random: {says: chance, deciding: true}\n',
        encoding='utf-8',
    )
    new = Template('90_new')
    assert (new.rule('above-random', {}).says, new.rule('above-masks', {}).says) == (
        'chance',
        'any masks',
    )
    assert new.rule('above-random', {}).deciding and not new.rule('above-masks', {}).deciding


@pytest.mark.parametrize('name', sorted(p.stem for p in (ROOT / 'nbs').glob('[1-9]*.ipynb')))
def test_a_template_begins_and_ends_with_its_report(name):
    from mope_clip.report.templates import Template

    cells = Template(name).code
    assert cells[1].split('\n')[-1] == 'report = Report(globals())', 'second code cell'
    assert cells[-1].strip().split('\n')[-1].startswith('report.finish('), 'last code cell'
    assert name not in ''.join(cells[1:]), 'no template types its own name'


def test_parameters_cells_tell_templates_apart():
    from mope_clip.report.templates import Template, template_names

    cells = [Template(name).parameters_cell.strip() for name in template_names()]
    assert len(set(cells)) == len(cells)


@pytest.mark.parametrize('name', sorted(p.stem for p in (ROOT / 'nbs').glob('[1-9]*.ipynb')))
def test_prose_of_templates_has_its_decimals_from_results(name):
    "Behind the last code cell, where results are spoken of, no decimal is typed by hand"
    from mope_clip.report.templates import Template, source_of

    cells = Template(name).cells
    last = max(i for i, cell in enumerate(cells) if cell['cell_type'] == 'code')
    text = re.sub(r'\{\{.+?\}\}', '', ''.join(map(source_of, cells[last + 1 :])))
    allowed = {'0.9', '0.63'}  # a rule; what racing cost, which is gone
    assert set(re.findall(r'\d+\.\d+', text)) <= allowed


# ---------------------------------------------------------------- provenance


def test_provenance_stops_no_run_outside_a_repository(toy_repo):
    from mope_clip.report.provenance import code_now, provenance

    made = provenance(code_now('90_toy'), time.time() - 60, [3], data=dict(test='0123abcd'))
    assert (made['commit'], made['dirty'], made['template_hash']) == ('', False, '')
    assert made['seeds'] == [3] and made['data'] == dict(test='0123abcd')
    assert {'versions', 'device', 'threads', 'cpus'} <= set(made)
    assert made['wall_time'] >= 60 and made['peak_memory'] > 100e6  # torch alone takes more
    assert made['versions']['torch'] == version('torch')
    assert json.loads(json.dumps(made)) == made


def test_a_fingerprint_tells_sets_apart():
    from mope_clip.data import synth_pairs
    from mope_clip.report.provenance import fingerprint

    pairs = synth_pairs(6)
    turned = pairs.select(range(5, -1, -1))
    columns = {**pairs.to_dict(), 'image': list(turned['image'])}
    repainted = pairs.from_dict(columns, features=pairs.features)  # the same ids
    assert fingerprint(synth_pairs(6)) == fingerprint(pairs)
    assert len({fingerprint(p) for p in (pairs, synth_pairs(5), turned, repainted)}) == 4


def test_pictures_of_the_artwork_carry_its_credit():
    from mope_clip.data import load_labelled, load_pairs, synth_pairs
    from mope_clip.report.provenance import credit, data_record

    drawn = load_pairs('openmoji', 'validation', 2)
    assert 'CC BY-SA' in credit(drawn) and credit(synth_pairs(2)) == ''
    assert set(data_record(dict(scored=drawn))) == {'scored', 'sprites'}
    assert set(data_record(dict(scored=synth_pairs(2)))) == {'scored'}
    assert 'sprites' in data_record(dict(concept=load_labelled('concept', 'test', 2)))


# ---------------------------------------------------------------- results


@pytest.fixture(scope='module')
def tiny():
    from mope_clip.clip import tiny_clip

    return tiny_clip()


def test_recalls_are_those_of_retrieval_with_errors_over_images(tiny):
    from mope_clip.data import synth_pairs
    from mope_clip.evaluate import retrieval
    from mope_clip.report.results import recall_rows

    pairs = synth_pairs(16)
    measured = recall_rows(tiny, pairs).set_index('metric')
    assert measured.value.to_dict() == retrieval(tiny, pairs)
    for k in (1, 5, 10):
        share = measured.value[f'TR@{k}']
        assert measured.se[f'TR@{k}'] == pytest.approx((share * (100 - share) / 15) ** 0.5, abs=0.1)
    assert 0 < measured.value['TR@10'] < 100 and (measured.se.drop('TR@1') > 0).all()


def test_results_are_one_whole_file(tiny, tmp_path):
    from mope_clip.clip import prune
    from mope_clip.data import synth_pairs
    from mope_clip.evaluate import cost, retrieval
    from mope_clip.metrics import random_scores
    from mope_clip.pruners import plan_width
    from mope_clip.report.results import Results
    from mope_clip.report.templates import Rule

    pairs, half = synth_pairs(16), prune(tiny, plan_width(random_scores(tiny), keep=0.5))
    results = Results('90_toy', tmp_path / 'runs', dict(task='synth'))
    for stage, clip in (('teacher', tiny), ('pruned', half)):
        results.add(clip, pairs, 'random', stage, seed=1)
    rule = Rule('at least 90 %', 'budget')
    for met in (True, False, None):
        results.claim('half', rule, 61, '61 % are left', 55, 67, met=met)
    rule = Rule('above it', deciding=True, added='2026-11-27')
    results.claim('ahead', rule, 1, 'it is', 0.5, 1.5, claim=3, n=16, teachers=3, draws=5)
    saved = json.loads(results.write(seeds=[1], data=dict(scored='ab')).read_text(encoding='utf-8'))
    assert [p.name for p in (tmp_path / 'runs').iterdir()] == ['results.json']
    keys = ['schema', 'name', 'scale', 'parameters', 'rows', 'cost', 'claims', 'provenance']
    assert list(saved) == keys
    assert (saved['name'], saved['parameters']) == ('90_toy', dict(task='synth'))
    labels = {'task', 'split', 'method', 'tower', 'size', 'stage', 'seed', 'metric', 'value', 'se'}
    assert set(saved['rows'][0]) == labels and len(saved['rows']) == 2 * 7
    assert saved['rows'] == results.rows and saved['provenance']['data'] == dict(scored='ab')
    assert [r['size'] for r in saved['rows'][::7]] == [cost(c)['params'] for c in (tiny, half)]
    verdicts = [c.pop('verdict') for c in saved['claims']]
    assert verdicts == ['met', 'missed', 'not tested', 'better']
    numbers = dict(id='half', value=61.0, low=55.0, high=67.0, text='61 % are left')
    marks = dict(rule='at least 90 %', kind='budget', deciding=False, claim=None)
    counted = dict(n=None, teachers=1, draws=1)
    assert saved['claims'][0] == {**numbers, **marks, **counted}
    numbers = dict(id='ahead', value=1.0, low=0.5, high=1.5, text='it is')
    marks = dict(rule='above it', kind='contrast', deciding=True, claim=3, added='2026-11-27')
    assert saved['claims'][3] == {**numbers, **marks, **dict(n=16, teachers=3, draws=5)}
    said = '- **missed**: 61 % are left. Rule: at least 90 %.'
    assert results.verdicts().splitlines()[1] == said
    table = results.table()
    assert list(table.index) == ['teacher', 'pruned']
    assert table.loc['pruned'].to_dict() == retrieval(half, pairs)


@pytest.mark.parametrize(
    'low, high, verdict',
    [
        (0.1, 9.0, 'better'),
        (-9.0, -0.1, 'worse'),
        (-1.0, 1.0, 'not told apart'),
        (0.0, 0.0, 'not told apart'),
        (-1.0, 1.1, 'too few to say'),
        (None, None, 'too few to say'),
        (float('nan'), float('nan'), 'too few to say'),
    ],
)
def test_the_verdict_of_a_contrast_follows_from_its_interval(low, high, verdict):
    from mope_clip.report.results import compared

    assert compared(low, high) == verdict


def test_a_headline_is_the_first_claim_or_the_first_and_last_recall():
    from mope_clip.report.results import headline

    stages = dict(teacher=80.0, narrow=70.0, pruned=61.5)
    rows = [row(stage=stage, value=value) for stage, value in stages.items()]
    toy = dict(claims=[], rows=rows)
    assert headline(toy) == 'teacher: 80.0 %, pruned: 61.5 % mean recall'
    assert headline({**toy, 'claims': [dict(text='three quarters are left')]}) == (
        'three quarters are left'
    )
    assert headline(dict(claims=[], rows=[])) == ''


# ---------------------------------------------------------------- the frame


SPACE = dict(__annotations__=dict(images=int, seed=int, out_dir=str), images=4, seed=7)


@pytest.fixture
def framed(toy_repo, monkeypatch):
    "A report of a toy template, in this process"
    from mope_clip.report import Report

    write_notebook(
        toy_repo / 'nbs' / '90_toy.ipynb',
        prose('# Toy'),
        code("images: int = 8\nseed: int = 0\nout_dir: str = ''", ['parameters']),
    )
    (toy_repo / 'nbs' / '90_toy.yaml').write_text(
        "rules:\n  'above-{other}': {says: 'above {other} on {images} images and {more}'}\n",
        encoding='utf-8',
    )
    reports = []

    def make(**changed):
        reports.append(Report({**SPACE, 'out_dir': '', **changed}))
        return reports[-1]

    monkeypatch.delenv('JPY_SESSION_NAME', raising=False)
    yield make
    for report in reports:
        report.recorder.stop()


def history(*sources):
    return dict(_ih=['', *sources])


def test_a_report_knows_its_template_by_the_first_executed_cell(framed):
    cell = "images: int = 8\nseed: int = 0\nout_dir: str = ''\n"
    assert framed(**history(cell, 'import time')).name == '90_toy'


def test_a_report_knows_its_template_by_the_session(framed, monkeypatch):
    monkeypatch.setenv('JPY_SESSION_NAME', '/somewhere/90_toy.ipynb')
    assert framed(**history('images: int = 3  # edited')).name == '90_toy'


def test_a_report_that_cannot_know_its_template_asks_for_the_name(framed):
    with pytest.raises(ValueError, match="name='20_finetune'"):
        framed(**history('1 + 1'))


def test_a_whole_number_whose_default_is_above_zero_must_be_at_least_one(framed, monkeypatch):
    monkeypatch.setenv('JPY_SESSION_NAME', '90_toy.ipynb')
    with pytest.raises(ValueError, match=r'Parameter images is 0, but must be at least 1.'):
        framed(images=0)
    assert framed(seed=0).seeds == [0]  # a seed may be zero


def test_a_claim_takes_its_rule_from_the_yaml_file(framed, monkeypatch):
    from mope_clip.report.comparison import Interval

    monkeypatch.setenv('JPY_SESSION_NAME', '90_toy.ipynb')
    report = framed()
    report.contrast('above-masks', Interval(1, 0.5, 1.5), 'it is ahead', more='two seeds', n=4)
    claim = report.results.claims[0]
    assert claim['rule'] == 'above masks on 4 images and two seeds' and claim['n'] == 4
    assert claim['text'] == 'it is ahead: +1.0 points (+0.5 to +1.5)'
    nothing = Interval(*[float('nan')] * 3)
    report.contrast('above-masks', nothing, 'too few captions', more='x')
    claim = report.results.claims[1]
    assert (claim['value'], claim['low'], claim['verdict']) == (None, None, 'too few to say')
    assert claim['text'] == 'too few captions'
    with pytest.raises(ValueError, match=r"90_toy.yaml has no rule 'below'"):
        report.contrast('below', nothing, 'it is')
    with pytest.raises(ValueError, match='is a contrast: say it with'):
        report.goal('above-masks', True, 1.0, 'it is', more='x')


def test_a_report_that_is_finished_says_what_was_executed(framed, monkeypatch, tiny, capsys):
    from mope_clip.data import synth_pairs
    from mope_clip.report.comparison import Interval
    from mope_clip.report.provenance import state_of

    monkeypatch.setenv('JPY_SESSION_NAME', '90_toy.ipynb')
    report = framed()
    pairs = synth_pairs(4)
    report.data(test=pairs)
    report.add(tiny, pairs, 'mope', 'teacher')
    report.contrast('above-masks', Interval(1, 0.5, 1.5), 'it is above', more='x')
    report.finish(model=report.out / 'model')
    saved = json.loads((report.out / 'results.json').read_text(encoding='utf-8'))
    functions = saved['provenance']['functions']
    assert 'mope_clip.evaluate.recall.ranks' in functions and all(functions.values())
    assert not any('.report.code.' in f or '.report.frame.' in f for f in functions)
    assert saved['provenance']['seeds'] == [7] and state_of(saved) == 'fresh'
    assert set(saved['provenance']['data']) == {'test'}
    said = capsys.readouterr().out
    assert 'it is above' in said and f'model:   {report.out / "model"}' in said


def test_what_an_earlier_attempt_executed_stays_in_the_record(framed, monkeypatch, tiny, capsys):
    from mope_clip.data import synth_pairs
    from mope_clip.report.frame import RECORD

    monkeypatch.setenv('JPY_SESSION_NAME', '90_toy.ipynb')
    first = framed()
    first.add(tiny, synth_pairs(4), 'mope', 'teacher')  # and then it is cut off
    first.recorder.stop()
    again = framed()
    assert 'mope_clip.evaluate.recall.ranks' in again.recorder.functions()
    again.recorder.stop()
    record = json.loads((first.out / RECORD).read_text(encoding='utf-8'))
    (first.out / RECORD).write_text(
        json.dumps({**record, 'mope_clip.data.files.digest': 'old'}), encoding='utf-8'
    )
    capsys.readouterr()
    assert framed().recorder.functions()['mope_clip.data.files.digest'] == 'old'
    assert 'the report will be stale' in capsys.readouterr().out


def test_what_was_entered_before_a_kill_is_in_the_record(framed, monkeypatch):
    from mope_clip.data import synth_pairs
    from mope_clip.data.files import write_atomic

    monkeypatch.setenv('JPY_SESSION_NAME', '90_toy.ipynb')
    first = framed()
    synth_pairs(4)
    write_atomic(first.out / 'piece', lambda file: file.write(b'half'))  # then it is killed
    first.recorder.stop()
    again = framed()
    again.recorder.stop()
    assert any(name.endswith('.synth_pairs') for name in again.recorder.functions())


def test_what_is_put_on_the_disk_during_a_run_is_not_what_it_ran(framed, toy_repo, monkeypatch):
    from mope_clip.report.comparison import Interval
    from mope_clip.report.provenance import template_hash

    monkeypatch.setenv('JPY_SESSION_NAME', '90_toy.ipynb')
    was = template_hash('90_toy')
    report = framed()
    notebook, rules = (toy_repo / 'nbs' / f'90_toy.{ending}' for ending in ('ipynb', 'yaml'))
    write_notebook(notebook, prose('# Toy'), code('images: int = 9', ['parameters']))
    rules.write_text("rules:\n  'above-{other}': {says: 'another rule'}\n", encoding='utf-8')
    assert template_hash('90_toy') != was
    report.contrast('above-b', Interval(1, 0.5, 1.5), 'it is', more=1)
    saved = json.loads(report.write().read_text(encoding='utf-8'))
    assert saved['provenance']['template_hash'] == was
    assert saved['claims'][0]['rule'] == 'above b on 4 images and 1'


# ---------------------------------------------------------------- stored by the runner


def test_noise_is_taken_out_of_an_executed_notebook(toy_repo):
    from mope_clip.report.runner import tidy_notebook, without_place

    def shown(kind, text):
        return dict(output_type='display_data', data={kind: text}, metadata={})

    warning = dict(output_type='stream', name='stderr', text=['auto.py:21: TqdmWarning: IProgress'])
    outputs = [
        shown('text/plain', [f'saved in {toy_repo}/scratch/figure.png']),
        shown('text/html', ['<progress value="3"></progress>']),
        shown('text/html', ['<table></table>']),
        shown('text/html', ['\n<style>\n progress {border: none}</style>']),
        shown('text/html', ''),
        shown('text/plain', ''),
        shown('text/plain', ['<Figure size 480x320 with 1 Axes>']),
        warning,
    ]
    cell = dict(code('x', ['parameters'], outputs), id='a1')
    cell['metadata']['papermill'] = dict(duration=1.5)
    path = toy_repo / 'executed.ipynb'
    about = dict(kernelspec=dict(name='python3'), papermill=dict(duration=2.5))
    path.write_text(json.dumps(dict(cells=[cell], metadata=about)), encoding='utf-8')
    tidied = tidy_notebook(without_place(path))
    assert tidied['metadata'] == dict(kernelspec=dict(name='python3'))
    assert tidied['cells'][0]['metadata'] == dict(tags=['parameters'])
    assert tidied['cells'][0]['id'] == 'a1'
    assert [o['data'] for o in tidied['cells'][0]['outputs']] == [
        {'text/plain': ['saved in scratch/figure.png']},
        {'text/html': ['<table></table>']},
    ]


def test_results_get_their_scale_their_day_and_the_longest_run(toy_repo):
    from mope_clip.report.provenance import longest_run
    from mope_clip.report.runner import dated_results

    path = write_results(toy_repo, '90_toy')
    before = json.loads(path.read_text(encoding='utf-8'))
    after = dated_results(before, 'smoke', 86_400 * 365.25 * 30, 900)
    assert longest_run(dated_results(after, 'full', 0, 60)) == 900
    assert (before['scale'], after['scale']) == ('full', 'smoke')
    assert after['provenance'] == {
        **before['provenance'],
        'date': '2000-01-01',
        'longest_wall_time': 900,
    }
    assert {**after, 'scale': 'full', 'provenance': before['provenance']} == before


def test_kept_outputs_differ_only_where_something_else_is_shown(toy_repo):
    from mope_clip.report.runner import keep_outputs

    path = toy_repo / 'nbs' / '00_toy.ipynb'
    noisy = 'import tempfile, sys, os\nprint(tempfile.mkdtemp())\nprint("beware", file=sys.stderr)'
    write_notebook(
        path,
        code(noisy),
        code('object(), os.environ["IN_TEST"], 1 + 1'),
        code('from PIL import Image\nImage.new("RGB", (200, 200), "teal")'),
    )
    keep_outputs('00_toy')
    once = path.read_text(encoding='utf-8')
    keep_outputs('00_toy')
    assert path.read_text(encoding='utf-8') == once  # folder and address were others
    shown = [c['outputs'] for c in json.loads(once)['cells']]
    assert [''.join(o['text']) for o in shown[0]] == ['tmp\n']
    assert [''.join(o['data']['text/plain']) for o in shown[1]] == ["(<object>, '1', 2)"]
    assert len(shown[2][0]['data']['image/png']) < 800
    for name in ('90_toy', '00_none'):
        with pytest.raises(ValueError, match='There is no library notebook'):
            keep_outputs(name)


TOY = """from mope_clip.report import Report

report = Report(globals())"""
LAST = """from mope_clip.data.files import digest
report.keep([dict(task=task, split='test', method='mope', tower='both', size=1, stage='pruned',
                  seed=0, metric='mean_recall', value=61.5, se=None)])
(report.out / 'model.safetensors').write_text('weights', encoding="utf-8")
digest('a')
print('of', task)
report.finish()"""


def toy_template(root, *more):
    "A template that is run in a kernel"
    write_notebook(
        root / 'nbs' / '90_toy.ipynb',
        prose('# Toy'),
        code("task: str = 'coco'\nout_dir: str = ''", ['parameters']),
        code(TOY),
        code(LAST),
        *more,
    )


def test_a_report_is_stored_without_weights_and_turns_stale_by_itself(toy_repo):
    from mope_clip.report import report, write_index
    from mope_clip.report.provenance import state_of

    with pytest.raises(ValueError, match=r"There is no notebook '91_toy': choose one of 90_toy."):
        toy_template(toy_repo)
        report('91_toy')
    with pytest.raises(ValueError, match=r"90_toy has no scale 'smoke': choose one of full."):
        report('90_toy', 'smoke')
    folder = report('90_toy')
    assert folder == toy_repo / 'reports' / '90_toy'
    assert sorted(p.name for p in folder.iterdir()) == ['90_toy.ipynb', 'results.json']
    assert len(list((toy_repo / 'runs').rglob('model.safetensors'))) == 1
    assert 'of coco' in (folder / '90_toy.ipynb').read_text(encoding='utf-8')

    (toy_repo / 'nbs' / '90_toy.yaml').write_text('smoke: {task: small}', encoding='utf-8')
    small = report('90_toy', 'smoke')
    assert small == toy_repo / 'runs' / '90_toy-smoke' / 'report'
    assert 'of small' in (small / '90_toy.ipynb').read_text(encoding='utf-8')
    scales = [
        json.loads((f / 'results.json').read_text(encoding='utf-8'))['scale']
        for f in (folder, small)
    ]
    assert scales == ['full', 'smoke']

    line = write_index(check=True).read_text(encoding='utf-8').splitlines()[-1]
    assert 'pruned: 61.5 % mean recall' in line and '| fresh |' in line
    assert line.endswith('| `mope report 90_toy` |')

    path, stored = toy_repo / 'nbs' / '90_toy.ipynb', folder / '90_toy.ipynb'
    ran = json.loads(stored.read_text(encoding='utf-8'))['cells']
    notebook = json.loads(path.read_text(encoding='utf-8'))
    said = prose('{{this|row|pruned|mean_recall}} % are left.')
    notebook['cells'].append(said)
    path.write_text(json.dumps(notebook), encoding='utf-8')
    with pytest.raises(ValueError, match='has not the text of its notebook: run `mope index`'):
        write_index(check=True)
    write_index()
    now = json.loads(stored.read_text(encoding='utf-8'))['cells']
    assert now[:-1] == [{**c, 'metadata': dict(tags=c['metadata'].get('tags', []))} for c in ran]
    assert ''.join(now[-1]['source']) == '61.5 % are left.'

    (toy_repo / 'nbs' / '90_toy.yaml').write_text(
        'smoke: {task: small}\nrules: {a: {says: b}}\n', encoding='utf-8'
    )
    results = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
    assert state_of(results) == 'stale', 'the rules of its YAML file changed'
    (toy_repo / 'nbs' / '90_toy.yaml').write_text('smoke: {task: small}', encoding='utf-8')
    assert state_of(results) == 'fresh', 'and were taken back'
    toy_template(toy_repo, code('print(1)'))
    with pytest.raises(ValueError, match='out of date: run `mope index`'):
        write_index(check=True)
    assert '| stale: its code changed since |' in write_index().read_text(encoding='utf-8')
    assert '61.5 % are left' in stored.read_text(encoding='utf-8'), 'a stale report keeps its text'


def test_a_run_does_not_go_on_from_pieces_of_other_code(toy_repo, capsys):
    from mope_clip.report.frame import RECORD
    from mope_clip.report.runner import report

    toy_template(toy_repo)
    work = toy_repo / 'runs' / '90_toy-full'
    work.mkdir(parents=True)
    (work / 'piece').write_text('of an earlier run', encoding='utf-8')
    (work / RECORD).write_text(
        json.dumps({'mope_clip.data.files.digest': 'of other code'}), encoding='utf-8'
    )
    report('90_toy')
    assert 'digest changed since an earlier run' in capsys.readouterr().out
    assert not (work / 'piece').exists() and (work / 'results.json').is_file()


def test_a_run_from_before_a_parameter_was_there_is_made_anew(toy_repo, capsys):
    from mope_clip.report.runner import report

    toy_template(toy_repo)
    report('90_toy')
    results = toy_repo / 'runs' / '90_toy-full' / 'results.json'
    run = json.loads(results.read_text(encoding='utf-8'))
    del run['parameters']['task']
    results.write_text(json.dumps(run), encoding='utf-8')
    report('90_toy')
    assert 'an earlier run had task None and is deleted' in capsys.readouterr().out
    assert 'task' in json.loads(results.read_text(encoding='utf-8'))['parameters']


def test_a_report_with_parameters_deletes_nothing_of_another(toy_repo):
    from mope_clip.report.runner import report

    toy_template(toy_repo)
    report('90_toy')
    runs = toy_repo / 'runs'
    with pytest.raises(ValueError, match="Unknown parameter 'tasc', did you mean 'task'"):
        report('90_toy', tasc='flickr30k')
    with pytest.raises(ValueError, match='A report has a folder of its own: leave out out_dir'):
        report('90_toy', out_dir='elsewhere')
    folder = report('90_toy', task='flickr30k')
    assert folder.parent.parent == runs and 'of flickr30k' in (folder / '90_toy.ipynb').read_text()
    assert folder.parent.name.startswith('90_toy-full-')
    official = json.loads((runs / '90_toy-full' / 'results.json').read_text(encoding='utf-8'))
    assert official['parameters']['task'] == 'coco'
    assert len(list((runs / '90_toy-full').rglob('model.safetensors'))) == 1


def test_an_old_report_outlives_the_pieces_of_its_run(tmp_path):
    from mope_clip.report.runner import clear

    (tmp_path / 'report').mkdir()
    (tmp_path / 'report' / 'results.json').touch()
    (tmp_path / 'scores').mkdir()
    (tmp_path / 'executed.json').touch()
    clear(tmp_path)
    assert [path.name for path in tmp_path.rglob('*')] == ['report', 'results.json']


def test_reports_of_the_old_schema_are_read_and_are_stale(toy_repo):
    from mope_clip.report import write_index, write_page
    from mope_clip.report.provenance import why_stale
    from mope_clip.report.results import read_results

    for name in ('20_finetune', '47_engine_cost'):
        shutil.copytree(ROOT / 'reports' / name, toy_repo / 'reports' / name)
        old = read_results(toy_repo / 'reports' / name / 'results.json')
        old['schema'] = 1
        for key in ('functions', 'template_hash'):
            old['provenance'].pop(key, None)
        old['provenance']['code_hash'] = '0123456789abcdef'
        for claim in old['claims']:
            claim.pop('kind', None)
            claim.pop('deciding', None)
        (toy_repo / 'reports' / name / 'results.json').write_text(json.dumps(old), encoding='utf-8')
        assert why_stale(old) == ['it was made before it was recorded what a run executes']
    write_index()
    write_page()
    page = (toy_repo / 'reports' / 'index.html').read_text(encoding='utf-8')
    assert '2 of 2 reports were run: 0 fresh, 2 stale' in page


# ---------------------------------------------------------------- numbers in prose


@pytest.fixture
def with_readme(toy_repo):
    "A repository with a report that a README speaks of"
    stages = dict(teacher=80.0, narrow=70.0, pruned=61.5)
    rows = [row(stage=stage, value=value) for stage, value in stages.items()]
    claims = [
        ('half', False, 61.0, 'at least 90 %', '61 % | are left'),
        ('rest', True, -0.25, 'none', 'none is lost', -1.04, 0.5),
    ]
    folder = toy_repo / 'reports' / '90_toy'
    write_notebook(toy_repo / 'nbs' / '90_toy.ipynb', prose('# Toy'))
    write_results(folder, '90_toy', rows, claims, minutes=1.5, kept_percent=76.9)
    (folder / 'sizes.csv').write_text(
        'size,method,recall\nhalf,mope,94.96\nhalf,random,92.7\n', encoding='utf-8'
    )
    return toy_repo


def write_index_notebook(root, *texts):
    write_notebook(root / 'nbs' / 'index.ipynb', code('hidden = 1'), *map(prose, texts))


def test_the_readme_is_the_prose_of_a_notebook_with_numbers_of_files(with_readme):
    from mope_clip.report.readme import write_readme

    write_index_notebook(
        with_readme,
        '# Toy',
        'Recall is {{90_toy|pruned|mean_recall}} %, [here](../reports/90_toy/results.json).',
        '',
        'Kept: {{90_toy|cost|kept_percent}} %, see [it](90_toy.ipynb).',
    )
    assert write_readme().read_text(encoding='utf-8').split('\n\n') == [
        '# Toy',
        'Recall is 61.5 %, [here](reports/90_toy/results.json).',
        'Kept: 76.9 %, see [it](nbs/90_toy.ipynb).\n',
    ]
    write_readme(check=True)
    write_index_notebook(with_readme, '# Toy, revised')
    with pytest.raises(ValueError, match=r'not what nbs/index.ipynb says: run `mope readme`'):
        write_readme(check=True)


def test_fields_name_claims_costs_and_times(with_readme):
    from mope_clip.report.readme import readme_field

    half = '| [90_toy](reports/90_toy/90_toy.ipynb) | missed | 61 % / are left |'
    rest = '| [90_toy](reports/90_toy/90_toy.ipynb) | not told apart | none is lost |'
    assert readme_field('90_toy|claims|') == f'{half}\n{rest}'
    assert readme_field('90_toy|claims|half') == half
    assert readme_field('90_toy|minutes|') == '1.5'
    assert readme_field('91_toy|claims|') == '(not run yet)'
    with pytest.raises(ValueError, match="has no claim 'third': choose of half, rest"):
        readme_field('90_toy|claims|half;third')


def test_a_stale_claim_says_so(with_readme):
    from mope_clip.report.readme import readme_field

    assert '| not told apart | none' in readme_field('90_toy|claims|rest')
    write_notebook(with_readme / 'nbs' / '90_toy.ipynb', prose('# Toy'), code('x = 1'))
    assert '| not told apart (stale: its code changed since) | none' in readme_field(
        '90_toy|claims|rest'
    )


@pytest.mark.parametrize(
    'field, text',
    [
        ('this|claim|rest', f'{MINUS}0.2 ({MINUS}1.0 to +0.5)'),
        ('this|claim|rest|value|2', f'{MINUS}0.25'),
        ('this|claim|half', '+61.0'),
        ('this|table|sizes|half; random|recall', '92.7'),
        ('this|table|sizes|mope|recall|2', '94.96'),
        ('this|row|narrow|mean_recall', '70.0'),
        ('this|minutes', '1.5'),
    ],
)
def test_a_template_names_numbers_of_its_own_report(with_readme, field, text):
    from mope_clip.report.readme import fill_own

    folder = with_readme / 'reports' / '90_toy'
    assert fill_own('{{' + field + '}} left', folder) == f'{text} left'


def test_a_field_that_nothing_fills_is_an_error_or_a_dash(with_readme):
    from mope_clip.report.readme import fill_own

    folder = with_readme / 'reports' / '90_toy'
    for field in ('this|claim|gone', 'this|table|none|a|b', 'this|cost|none', 'this|row|a|b'):
        with pytest.raises(ValueError, match='cannot be filled'):
            fill_own('{{' + field + '}}', folder)
        assert fill_own('{{' + field + '}}', folder, missing='-') == '-'


@pytest.mark.parametrize('name', sorted(p.stem for p in (ROOT / 'nbs').glob('[1-9]*.ipynb')))
def test_fields_of_templates_are_filled_by_their_reports(name):
    "As far as the committed report is of this template; what its run lacks yet is left out"
    from mope_clip.report.readme import fill_own, results_of
    from mope_clip.report.templates import Template, source_of

    if not results_of(name):
        pytest.skip(f'{name} was not run yet')
    fresh = results_of(name)['schema'] > 1
    new = 'least_kept', 'cost|kept_', 'cost|chance', 'cost|teacher', 'cost|scoring_seconds'
    for field in re.findall(r'\{\{this.+?\}\}', ''.join(map(source_of, Template(name).cells))):
        if fresh or not any(word in field for word in new):
            fill_own(field, ROOT / 'reports' / name)


@pytest.mark.parametrize(
    'kind, spellings, wanted',
    [
        (bool, [False, 'False', 'false', '0', 0], False),
        (bool, [True, 'True', 'true', '1', 1], True),
        (int, [3, '3', 3.0], 3),
        (float, [0.5, '0.5'], 0.5),
        (str, [2017, '2017'], '2017'),
        (str, [{'image': 'photo'}, '{"image": "photo"}'], '{"image": "photo"}'),
        (list, [['a'], '["a"]'], ['a']),
    ],
)
def test_a_parameter_is_read_in_any_spelling_of_its_type(kind, spellings, wanted):
    from mope_clip.report.parameters import check_parameters

    for given in spellings:
        namespace = {'__annotations__': {'p': kind}, 'p': given}
        assert check_parameters(namespace) == {'p': wanted}
        assert namespace['p'] == wanted and type(namespace['p']) is kind
