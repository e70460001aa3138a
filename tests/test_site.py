"What the pages of reports are made of, without a browser."

import base64
import io
import json
from contextlib import redirect_stdout
from unittest.mock import patch

import pytest
from toy import code, prose, row, write_notebook, write_results

bs4 = pytest.importorskip('bs4', reason="pip install 'mope_clip[dev]'")

TABLE = (
    '<table border="1"><thead><tr><th></th><th>recall</th></tr></thead>'
    '<tbody><tr><th>small</th><td>61.5</td></tr></tbody></table>'
)
INTRO = (
    '# Toy & co\n> Whether it *works*.\n\nWith $Z[f]$ and `$HOME`, see '
    '[the other](81_later.ipynb), [this one](80_toy.ipynb#Numbers), [data](../data/README.md) and '
    '[elsewhere](https://example.invalid).\n\n$$a = \\frac{1}{2}$$'
)


def soup_of(html):
    return bs4.BeautifulSoup(html, 'html.parser')


def numbers():
    "Two methods with two metrics each"
    return [
        row(method=method, metric=metric, value=value, se=se)
        for method in ('mope', 'random')
        for metric, value, se in (('TR@1', 61.5, None), ('IR@1', 60.0, 0.5))
    ]


@pytest.fixture
def toy(toy_repo):
    "A repository with a report that was run, and a notebook that was not"
    from PIL import Image

    from mope_clip.data.files import png

    folder, picture = toy_repo / 'reports' / '80_toy', png(Image.new('RGB', (60, 40), 'orange'))
    folder.mkdir()
    (folder / 'recall.png').write_bytes(picture['bytes'])
    (folder / 'recall.csv').write_text('size,recall\n1,2\n', encoding='utf-8')
    image = base64.b64encode(picture['bytes']).decode()
    outputs = [
        dict(output_type='display_data', metadata={}, data={'image/png': image}),
        dict(
            output_type='display_data',
            metadata={},
            data={'text/html': '<style scoped>a {}</style>' + TABLE},
        ),
    ]
    streams = [
        dict(output_type='stream', name=name, text=text)
        for name, text in (('stdout', '<2>'), ('stderr', 'beware'))
    ]
    for place in ('nbs', 'reports/80_toy'):
        write_notebook(
            toy_repo / place / '80_toy.ipynb',
            prose(INTRO),
            code("task: str = 'toy'", ['parameters']),
            prose('## Numbers'),
            code("x = 1 < 2\nsave_figure(fig, out, 'recall')", (), outputs),
            code('print(2)', (), streams),
        )
    write_notebook(toy_repo / 'nbs' / '81_later.ipynb', prose('# Later'))
    claims = [
        ('better', True, 1.5, 'above <random>', 'MoPE is above random', 0.25, 2.75),
        ('faster', False, -1234.5, 'at most 1', 'it is not faster'),
        ('other', None, None, 'none', 'nobody looked'),
    ]
    write_results(folder, '80_toy', numbers(), claims, minutes=1.5)
    return toy_repo


def declare(toy, name, text):
    (toy / 'nbs' / f'{name}.yaml').write_text(text, encoding='utf-8')


def restate(toy, source="task: str = 'new'"):
    "Another default in the parameters cell"
    path = toy / 'nbs' / '80_toy.ipynb'
    notebook = json.loads(path.read_text(encoding='utf-8'))
    notebook['cells'][1]['source'] = source
    path.write_text(json.dumps(notebook), encoding='utf-8')


def test_a_template_without_a_report_is_said_to_be_missing(toy):
    from mope_clip.report.readme import report_names, results_of

    assert report_names() == ['80_toy', '81_later'] and report_names(ran=True) == ['80_toy']
    assert results_of('80_toy')['name'] == '80_toy' and results_of('81_later') is None


def test_a_report_keeps_the_title_that_it_was_run_under(toy):
    from mope_clip.report.page import entries

    said = [(e.name, e.title, e.heading.purpose, e.state, len(e.claims)) for e in entries()]
    assert said == [
        ('80_toy', 'Toy & co', 'Whether it *works*.', 'fresh', 3),
        ('81_later', 'Later', '', 'not run yet', 0),
    ]
    restate(toy)
    path = toy / 'nbs' / '80_toy.ipynb'
    notebook = json.loads(path.read_text(encoding='utf-8'))
    notebook['cells'][0]['source'] = '# Renamed'
    path.write_text(json.dumps(notebook), encoding='utf-8')
    assert (entries()[0].state, entries()[0].title) == ('stale', 'Toy & co')


# ---------------------------------------------------------------- a page


def test_a_page_names_nothing_from_elsewhere():
    from mope_clip.report.render import document

    page = document('a < b', '<h1>Title</h1>', footer='<p>made by hand</p>')
    assert '<title>a &lt; b</title>' in page and '<header>' not in page
    assert page.endswith('made by hand</p>\n</footer>\n</body>\n</html>\n')
    assert not any(outside in page for outside in ('http', '<script', '@import', 'src='))


def luminance(colour):
    "Relative luminance of '#rrggbb' or '#rgb', as WCAG defines it"
    digits = colour[1:] if len(colour) == 7 else ''.join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a, b):
    "Contrast of two colours, from 1 to 21"
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read_in_the_light_and_in_the_dark():
    from mope_clip.report.render import STYLE

    for part in STYLE.split(':root ')[1:3]:
        lines = part.split('{')[1].split('}')[0].split(';')
        colours = dict(pair.strip().split(': ') for pair in lines if pair.strip())
        for ink in ('ink', 'soft', 'link', 'yes', 'no'):
            for ground in ('paper', 'code'):
                assert contrast(colours[f'--{ink}'], colours[f'--{ground}']) >= 4.5  # WCAG, AA


def test_formulas_become_elements_of_the_page():
    from mope_clip.report.render import mathml

    assert '<mfrac>' in mathml('a = \\frac{1}{2}', 'block')
    assert 'display="block"' in mathml('a', 'block') and 'display="inline"' in mathml('a')
    assert '\\' not in mathml('\\Big|\\big\\{x\\Bigr\\}')  # sizes are the browser's
    for unknown in ('\\nosuchcommand x', '\\begin{aligned}a &= b\\end{aligned}'):
        with pytest.raises(ValueError, match='does not know'):
            mathml(unknown)
    with pytest.raises(ValueError, match='cannot be rendered'):
        mathml('\\left( x')


def test_a_dollar_in_code_stays_one():
    import nbformat

    from mope_clip.report.render import exporter

    source = 'With $Z$ and `$HOME`:\n\n$$\\frac{1}{2}$$\n\n## End'
    cells = [nbformat.v4.new_markdown_cell(source)]
    one = exporter().from_notebook_node(nbformat.v4.new_notebook(cells=cells))[0]
    assert one.count('<math') == 2 and '$HOME' in one and '¶' not in one
    assert 'http' not in one.replace('http://www.w3.org/1998/Math/MathML', '')


@pytest.mark.parametrize(
    'fence, language, coloured',
    [('python title="x"', 'python', True), ('nosuch"x', 'nosuch"x', False)],
)
def test_the_first_word_of_a_fence_is_its_language(fence, language, coloured):
    import nbformat

    from mope_clip.report.render import exporter

    cell = nbformat.v4.new_markdown_cell(f'```{fence}\ndef f(): pass\n```')
    page = exporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))[0]
    block = soup_of(page).find('div', 'highlight')
    assert block['class'] == ['highlight', f'hl-{language}']
    assert block.get_text().strip() == 'def f(): pass'
    assert (block.find('span', 'k') is not None) == coloured


def test_a_missing_package_is_named():
    from mope_clip.report.render import exporter

    exporter.cache_clear()
    with (
        patch.dict('sys.modules', latex2mathml=None),
        pytest.raises(ImportError, match=r"pip install 'mope_clip\[dev\]'"),
    ):
        exporter()


def test_links_are_turned_for_the_rendered_page(toy):
    from mope_clip.report.render import relink

    write_notebook(toy / 'nbs' / '01_lesson.ipynb', prose('# Lesson'))
    links = {
        '81_later.ipynb': '../../nbs/81_later.ipynb',
        '80_toy.ipynb#Numbers': '#Numbers',
        '01_lesson.ipynb#a': '../lessons/01_lesson.html#a',
        '../data/README.md': '../../data/README.md',
        'https://a.b/c': 'https://a.b/c',
        '#here': '#here',
    }
    assert {href: relink(href, '80_toy') for href in links} == links
    assert relink('80_toy.ipynb#x', '90_other') == '../80_toy/80_toy.html#x'


def test_tables_say_what_their_headers_are_of():
    from mope_clip.report.render import mark_table

    soup = soup_of(
        '<table border="1"><thead><tr><th></th><th>a</th></tr></thead>'
        '<tr><th>b</th><td>1</td></tr></table>'
    )
    mark_table(soup.table, soup, 'Numbers')
    assert str(soup) == (
        '<div aria-label="Table under Numbers" class="wide" role="region" tabindex="0"><table>'
        '<thead><tr><td></td><th scope="col">a</th></tr></thead>'
        '<tr><th scope="row">b</th><td>1</td></tr></table></div>'
    )


def test_code_of_a_report_is_folded(toy):
    from mope_clip.report.render import render

    page = render('80_toy')
    soup = soup_of(page)
    assert [h.get_text() for h in soup.find_all(['h1', 'h2'])] == ['Toy & co', 'Numbers']
    assert soup.img['alt'] == 'Figure 1 of the notebook, under Numbers'
    assert soup.img['src'].startswith('data:image/png')
    folded = [s.get_text() for s in soup.find_all('summary')]
    assert folded == ['Parameters', 'Code 2', 'Code 3', 'Warnings']
    assert [len(soup.find_all(tag)) for tag in ('math', 'style', 'script')] == [2, 1, 0]
    assert '$HOME' in page and '&lt;2&gt;' in page and 'mathjax' not in page.lower()
    assert soup.find('th', scope='row').get_text() == 'small'
    assert soup.find('pre')['tabindex'] == '0'
    assert [a['href'] for a in soup.main.find_all('a')] == [
        '../../nbs/81_later.ipynb',
        '#Numbers',
        '../../data/README.md',
        'https://example.invalid',
    ]


def test_a_lesson_shows_its_code_and_not_what_nbdev_reads(toy):
    from mope_clip.report.render import render_lesson

    write_notebook(
        toy / 'nbs' / '01_lesson.ipynb',
        code('#| default_exp lesson'),
        prose('# Lesson\n\n## Twice\n\n## Twice'),
        code('#| export\ndef double(x):\n    return 2 * x'),
        code('#| hide\nimport nbdev'),
    )
    page = soup_of(render_lesson('01_lesson'))
    text = page.main.get_text()
    assert 'def double' in text and not page.details
    assert not any(word in text for word in ('export', 'hide', 'nbdev', 'default_exp'))
    ids = [tag['id'] for tag in page.find_all(id=True)]
    assert len(ids) == len(set(ids))


# ---------------------------------------------------------------- the index


CLAIM = dict(verdict='better', value=1.5, low=0.25, high=2.75, rule='a < b', text='it is')


def test_numbers_have_three_digits_that_count():
    from mope_clip.report.page import number

    values = 61.5, -1234.5, 0.00347, 0, 100.0, None, float('nan')
    assert [number(v) for v in values] == [
        '61.5',
        '\N{MINUS SIGN}1,234',
        '0.00347',
        '0',
        '100',
        '\N{EN DASH}',
        '\N{EN DASH}',
    ]


def test_a_claim_says_its_verdict_number_interval_and_rule():
    from mope_clip.report.page import claim_html

    whole = claim_html(CLAIM)
    assert '✓ better</strong>: it is.' in whole
    assert 'Number: 1.50 (0.250 to 2.75). Rule: a &lt; b.' in whole
    assert 'Number: 1.50, no interval. ' in claim_html(dict(CLAIM, low=None))
    assert 'Number' not in claim_html(dict(CLAIM, value=None))
    assert 'Deciding rule: a &lt; b.' in claim_html(dict(CLAIM, deciding=True))
    many = claim_html(dict(CLAIM, n=5000, teachers=3, draws=1))
    assert '3 teachers, 1 draw, 5,000 images. Rule: a &lt; b.' in many
    late = claim_html(dict(CLAIM, added='2026-11-27'))
    assert 'Exploratory rule, added 2026-11-27: a &lt; b.' in late


def test_verdicts_are_counted():
    from mope_clip.report.page import tally

    older = dict(verdict='holds <b>')
    assert tally([CLAIM, CLAIM, dict(verdict='worse'), older]) == (
        '<span class="no">✗ worse: 1</span>, <span class="yes">✓ better: 2</span>, '
        '<span class="open">\N{EN DASH} holds &lt;b&gt;: 1</span>'
    )
    assert tally([]) == '<span class="open">\N{EN DASH} not tested</span>'


def test_a_report_is_shown_by_the_picture_that_it_names_or_saves_first(toy):
    from mope_clip.report.page import entries, figure_html, picture

    folder = toy / 'reports' / '80_toy'
    (folder / 'aaa.png').write_bytes((folder / 'recall.png').read_bytes())
    assert picture('80_toy') == 'recall.png', 'not the first of the alphabet'
    image = soup_of(figure_html(entries()[0]))
    assert [a['href'] for a in image.find_all('a')] == ['80_toy/recall.png', '80_toy/recall.csv']
    declare(toy, '80_toy', 'figure: aaa\n')
    assert picture('80_toy') == 'aaa.png' and 'its numbers' not in figure_html(entries()[0])
    declare(toy, '80_toy', '')
    (folder / 'recall.png').unlink()
    assert (picture('80_toy'), figure_html(entries()[0])) == ('', '')


def test_new_templates_save_figures_by_their_report(toy):
    from mope_clip.report.page import SAVES

    source = "report.figure(\n    fig,\n    'curve', data)\nsave_figure(fig, out, 'old')"
    assert SAVES.findall(source) == ['curve', 'old']


def test_a_report_on_the_page_has_figure_verdicts_command_and_files(toy):
    from mope_clip.report.page import article_html, entries, provenance_html
    from mope_clip.report.provenance import template_hash
    from mope_clip.report.readme import results_of

    article = soup_of(article_html(entries()[0]))
    assert article.h3.get_text() == 'Toy & co'
    assert [s.get_text() for s in article.find_all('strong')] == [
        '✓ better',
        '✗ missed',
        '\N{EN DASH} not tested',
    ]
    files = 'recall.csv', 'recall.png', '80_toy.html', '80_toy.ipynb', 'results.json'
    assert {a['href'] for a in article.find_all('a')} == {f'80_toy/{f}' for f in files}
    assert 'mope report 80_toy' in article.get_text()
    assert article.find('span', 'state')['class'] == ['state', 'yes']
    assert '1.5 minutes' in article.details.get_text()
    results = results_of('80_toy')
    results['provenance'].update(date='2026-11-24', dirty=True)
    (toy / 'reports' / '80_toy' / 'results.json').write_text(json.dumps(results), encoding='utf-8')
    dated = provenance_html(entries()[0])
    assert '2026-11-24' in dated and 'not committed' in dated
    assert template_hash('80_toy') in dated
    restate(toy)
    assert 'its notebook or its rules changed' in provenance_html(entries()[0])


CLAIMS = """
1: {claim: One., short: One}
3: {claim: Three., short: Three}
5: {claim: Five., short: Five, ours: true}
"""
DECIDES = "claims: {3: ['be*', other]}\nrules: {better: {says: so, deciding: true}}\n"


def decided(toy, **claim):
    "The results of the toy with another first claim"
    path = toy / 'reports' / '80_toy' / 'results.json'
    results = json.loads(path.read_text(encoding='utf-8'))
    results['claims'][0].update(deciding=True, claim=3, **claim)
    path.write_text(json.dumps(results), encoding='utf-8')


def test_the_verdict_on_a_claim_is_that_of_its_deciding_rule(toy):
    from mope_clip.report.page import entries, evidence_html

    (toy / 'nbs' / 'claims.yaml').write_text(CLAIMS, encoding='utf-8')
    declare(toy, '80_toy', DECIDES)
    declare(toy, '81_later', "claims: {3: ['*'], 5: ['*']}\n")
    decided(toy)
    one, three, five = (soup_of(evidence_html(n, entries())) for n in (1, 3, 5))
    first, other = three.find_all('li')[:2]
    assert first.get_text().startswith('✓ better: MoPE is above random.')
    assert 'Deciding rule' in first.get_text() and not first.find_parent('details')
    assert other.get_text().strip() == '\N{EN DASH} not tested: nobody looked. Toy & co'
    assert other.find_parent('details').summary.get_text() == (
        'Other rules that speak to it: \N{EN DASH} not tested: 1'
    ), "'faster' is no evidence on this claim"
    assert three.find('img')['src'] == '80_toy/recall.png'
    assert 'Not run yet: Later.' in three.get_text() and 'Not run yet: Later.' in five.get_text()
    assert 'not run yet' in one.get_text() and five.h3.get_text() == 'Claim 5, of ours'


def test_the_answers_come_first_the_least_favourable_at_the_top(toy):
    from mope_clip.report.page import answers_html
    from mope_clip.report.readme import readme_field

    (toy / 'nbs' / 'claims.yaml').write_text(CLAIMS, encoding='utf-8')
    declare(toy, '80_toy', DECIDES)
    assert [a.get_text() for a in soup_of(answers_html()).find_all('a')] == [
        'Claim 1',
        'Claim 3',
        'Claim 5, of ours',
    ]
    decided(toy, verdict='worse', text='it is behind')
    lines = [li.get_text() for li in soup_of(answers_html()).find_all('li')]
    assert lines[0].strip() == 'Claim 3. Three ✗ worse: it is behind.'
    assert readme_field('claims').splitlines() == [
        '1. *One* Not run yet.',
        '3. *Three* **Worse** (stale: its code changed since): it is behind.',
        '5. *Five* Not run yet.',
    ]


def test_the_report_that_decides_a_claim_comes_first(toy):
    from mope_clip.report.readme import evidence

    (toy / 'nbs' / 'claims.yaml').write_text('1: {claim: a, short: b}', encoding='utf-8')
    declare(toy, '80_toy', "claims: {1: ['*']}\n")
    declare(toy, '81_later', "claims: {1: ['*']}\nrules: {a: {says: b, deciding: true}}\n")
    assert list(evidence(1, ['80_toy', '81_later'])) == ['81_later', '80_toy']


def test_everything_on_the_page_leads_somewhere(toy):
    from mope_clip.report.page import index_page

    (toy / 'nbs' / 'claims.yaml').write_text(CLAIMS, encoding='utf-8')
    declare(toy, '80_toy', "claims: {3: ['*']}\n")
    soup = soup_of(index_page())
    assert [h.get_text() for h in soup.find_all(['h1', 'h2'])] == [
        'What MoPE-CLIP claims, measured',
        'The claims, one by one',
        'All reports in a table',
        'Reports',
        'Not run yet',
        'How to read this page',
    ]
    said = (
        '1 of 2 reports were run: 1 fresh, 0 stale. Their 1 contrasts: ✓ better: 1; if there '
        'were no differences at all, about 0 would still be told apart by chance. Their 2 '
        'engineering goals: ✗ missed: 1, \N{EN DASH} not tested: 1.'
    )
    assert said in soup.get_text()
    beside = soup.find(id='beside').find_next('ul').find_all('a')
    assert [a['href'] for a in beside] == ['#81_later']
    ids = [tag['id'] for tag in soup.find_all(id=True)]
    inner = {a['href'][1:] for a in soup.find_all('a') if a['href'].startswith('#')}
    assert len(ids) == len(set(ids)) and inner <= set(ids)
    assert soup.find(id='81_later').name == 'li'


# ---------------------------------------------------------------- files


def test_every_run_is_a_row(toy):
    from mope_clip.report.readme import results_of
    from mope_clip.report.site import runs_table

    table = runs_table()
    labels = ['report', 'task', 'split', 'method', 'tower', 'stage', 'size', 'seed']
    assert list(table) == [*labels, 'TR@1', 'IR@1', 'IR@1 (se)']
    line = '80_toy,toy,test,mope,both,end,10,0,61.5,60.0,0.5'
    assert table.to_csv(index=False).splitlines()[1] == line
    results = results_of('80_toy')
    first = results['rows'][0]
    results['rows'] += [dict(first, value=7.0), dict(first, method='none', size=None)]
    (toy / 'reports' / '80_toy' / 'results.json').write_text(json.dumps(results), encoding='utf-8')
    assert list(runs_table()['TR@1'].dropna()) == [61.5, 61.5, 7.0, 61.5]
    text = runs_table().to_csv(index=False)
    assert ',end,10,0,' in text and ',end,,0,' in text


def test_files_are_written_again_only_where_something_changed(toy):
    from mope_clip.report.site import write_page

    write_notebook(toy / 'nbs' / '01_lesson.ipynb', prose('# Lesson'))
    with pytest.raises(ValueError, match=r'01_lesson.html is out of date: run `mope index`'):
        write_page(check=True)
    assert write_page() == toy / 'reports' / 'index.html'
    write_page(check=True)
    pages = sorted(p.name for p in (toy / 'reports').rglob('*.html'))
    assert pages == ['01_lesson.html', '80_toy.html', 'index.html']
    before = {p: p.read_bytes() for p in (toy / 'reports').rglob('*') if p.is_file()}
    restate(toy)
    with pytest.raises(ValueError, match=r'reports/index.html is out of date'):
        write_page(check=True)
    write_page()
    assert [p.name for p in before if p.read_bytes() != before[p]] == ['index.html']
    (toy / 'reports' / 'runs.csv').write_text('by hand', encoding='utf-8')
    with pytest.raises(ValueError, match=r'reports/runs.csv is out of date'):
        write_page(check=True)
    (toy / 'nbs' / '01_lesson.ipynb').unlink()
    write_page()
    assert not (toy / 'reports' / 'lessons' / '01_lesson.html').exists()


def test_what_cannot_be_made_again_does_not_wait(toy):
    from mope_clip.report.runner import waiting

    assert waiting() == {'81_later': None}
    restate(toy)
    assert list(waiting()) == ['80_toy', '81_later'] and 90 <= waiting()['80_toy'] < 100
    (toy / 'nbs' / '80_toy.ipynb').unlink()
    assert waiting() == {'81_later': None}


def test_what_fails_does_not_stop_the_others_and_what_is_fresh_is_not_run(toy):
    from mope_clip.report import runner
    from mope_clip.report.site import write_page

    restate(toy)
    asked = []

    def stand_in(name):
        "A report that fails for one notebook"
        asked.append(name)
        if name == '80_toy':
            raise ValueError('no data.\nmore')
        folder = toy / 'reports' / name
        write_notebook(folder / f'{name}.ipynb', prose('# Later'))
        write_results(folder, name, numbers())

    def do():
        "What failed, and what was said"
        with patch.object(runner, 'report', stand_in), redirect_stdout(io.StringIO()) as out:
            return runner.report_all(), out.getvalue()

    failed, said = do()
    assert asked == ['80_toy', '81_later'] and failed == {'80_toy': 'ValueError: no data'}
    assert '2 to run, 0 fresh' in said and '  failed: ValueError: no data' in said
    write_page(check=True)
    assert list(runner.waiting()) == ['80_toy']
    do()
    assert asked[2:] == ['80_toy'], 'what is fresh is not run again'
