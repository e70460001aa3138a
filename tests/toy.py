"A small repository for tests of reports: notebooks, YAML files, results."

import json

from mope_clip.report.results import Results
from mope_clip.report.templates import Rule

KERNEL = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
STANDS = {'mope_clip.data.files.digest': None}  # a function that every report here executed


def code(source, tags=(), outputs=()):
    "A code cell"
    cell = dict(cell_type='code', execution_count=None, outputs=list(outputs), source=source)
    return dict(cell, id=f'c{abs(hash(source)) % 10**8}', metadata=dict(tags=list(tags)))


def prose(source):
    "A Markdown cell"
    name = f'm{abs(hash(source)) % 10**8}'
    return dict(cell_type='markdown', id=name, metadata={}, source=source)


def write_notebook(path, *cells):
    "A notebook of these cells"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = dict(nbformat=4, nbformat_minor=5, metadata=KERNEL, cells=list(cells))
    path.write_text(json.dumps(whole), encoding='utf-8')


def executed():
    "A record as a run leaves it: what is executed is as it was"
    from mope_clip.report.code import library_now

    return {name: library_now().hash(name) for name in STANDS}


def row(**labels):
    "A measured number"
    base = dict(task='toy', split='test', method='mope', tower='both', size=10, stage='end', seed=0)
    return {**base, 'metric': 'mean_recall', 'value': 1.0, 'se': None, **labels}


def write_results(folder, name, rows=(), claims=(), minutes=0.0, **cost):
    """The results of a report, fresh as long as its notebook stays; a claim: id, whether a goal was
    met, value, rule, text, and of a contrast its interval
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(name, folder, {})
    results.started -= 60 * minutes
    results.rows += rows
    results.cost.update(cost)
    for id, met, value, says, text, *interval in claims:
        rule = Rule(says, 'contrast' if interval else 'budget')
        results.claim(id, rule, value, text, *interval, met=met)
    return results.write(functions=executed())
