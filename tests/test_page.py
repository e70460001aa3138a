"The page of reports in a real browser, with the network blocked: nothing comes from elsewhere, everything resolves, a keyboard and a screen reader find their way. And the command that makes all reports."

import base64
import json
import shutil
import sys
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, run

BROWSER = next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))),
    None,
)
SWITCHES = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--no-first-run',
    '--disable-default-apps',
]
RENDERED = sorted(p.parent.name for p in (ROOT / 'reports').glob('*/results.json'))
KEEP = 2_000_000  # bytes of a page at most; those of 52 and 54 carry a dozen pictures


@pytest.fixture(scope='module')
def browser():
    "Chromium, or the reason why there is none"
    playwright = pytest.importorskip(
        'playwright.sync_api', reason="playwright is not installed: pip install 'mope_clip[dev]'"
    )
    if not BROWSER:
        pytest.skip('no Chromium is installed: apt-get install chromium')
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=BROWSER, args=SWITCHES)
        yield b
        b.close()


class Visit:
    "A page that was opened offline; what it asked for and what it complained of"

    def __init__(self, browser, path, width=1200, **context):
        self.asked, self.said, self.path = [], [], path
        self.context = browser.new_context(viewport=dict(width=width, height=800), **context)
        self.context.route(
            lambda url: not url.startswith(('file://', 'data:')), lambda route: route.abort()
        )
        self.page = self.context.new_page()
        self.page.on(
            'request',
            lambda r: (
                self.asked.append(r.url) if not r.url.startswith(('file://', 'data:')) else None
            ),
        )
        self.page.on('requestfailed', lambda r: self.said.append(f'failed: {r.url[:200]}'))
        self.page.on(
            'console',
            lambda m: self.said.append(m.text) if m.type in ('error', 'warning') else None,
        )
        self.page.on('pageerror', lambda e: self.said.append(str(e)))
        self.page.goto(path.as_uri())
        self.page.evaluate(
            "Promise.all([...document.images].map(i => {i.loading = 'eager'; return i.decode().catch(() => 0)}))"
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def do(self, script):
        return self.page.evaluate(script)

    def focused(self):
        "What the next press of the tab key reaches"
        self.page.keyboard.press('Tab')
        return self.do(
            "(() => {const e = document.activeElement, s = getComputedStyle(e), r = e.getBoundingClientRect(); return {tag: e.tagName, name: e.getAttribute('aria-label') || e.textContent.trim() || (e.querySelector('img') || {}).alt || '', href: e.getAttribute('href'), outline: s.outlineStyle, seen: r.right > 0 && r.width > 0}})()"
        )


def check(visit):
    "What every page must be"
    assert visit.asked == [] and visit.said == []
    do = visit.do
    assert (
        do('document.compatMode') == 'CSS1Compat'
        and do('document.documentElement.lang') == 'en'
        and len(do('document.title')) > 5
    )
    assert do("['main', 'h1', 'title'].map(t => document.querySelectorAll(t).length)") == [1, 1, 1]
    assert (
        do("document.querySelectorAll('script, iframe, object, link[rel=stylesheet]').length") == 0
    )
    levels = do("[...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:])), levels
    assert (
        do(
            '[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 200))'
        )
        == []
    )
    assert do("[...document.images].filter(i => !(i.getAttribute('alt') || '').trim()).length") == 0
    assert (
        do(
            "[...document.querySelectorAll('a')].filter(a => !(a.textContent.trim() || (a.querySelector('img') || {}).alt)).length"
        )
        == 0
    )
    assert (
        do(
            "[...document.querySelectorAll('th')].filter(t => !t.scope || !t.textContent.trim()).length"
        )
        == 0
    )
    assert (
        do("[...document.querySelectorAll('table')].filter(t => !t.querySelector('th')).length")
        == 0
    )
    ids = do("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    for href in do("[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'))"):
        if href.startswith(('http:', 'https:', 'mailto:')):
            continue  # for the reader to follow; a page does not load it
        part = urlsplit(href)
        target = visit.path.parent / unquote(part.path) if part.path else visit.path
        assert target.exists(), f'{visit.path.name} links to {href}, which is not there'
        if part.fragment:
            assert f'id="{unquote(part.fragment)}"' in target.read_text(), (
                f'{visit.path.name} links to {href}, but {target.name} has no such place'
            )
    first = visit.focused()
    assert first['href'] == '#main' and first['seen'] and first['outline'] != 'none', first
    visit.page.keyboard.press('Enter')
    assert do('document.activeElement.id') == 'main'
    for _ in range(6):
        stop = visit.focused()
        if stop['tag'] == 'BODY':
            break  # the end of a short page
        assert stop['name'] and stop['seen'] and stop['outline'] != 'none', stop


def narrow(browser, path):
    "No page is wider than a small phone, in the light or in the dark, with everything opened"
    for scheme in ('light', 'dark'):
        with Visit(browser, path, width=360, color_scheme=scheme) as v:
            v.do("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert v.do('document.documentElement.scrollWidth') <= 360, (
                f'{path.name} scrolls sideways on a phone'
            )
            assert v.do('parseFloat(getComputedStyle(document.body).fontSize)') >= 16
            ink, paper = v.do(
                '[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor].map(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0))'
            )
            assert (ink < paper) == (scheme == 'light')


def test_the_committed_page(browser):
    path = ROOT / 'reports' / 'index.html'
    with Visit(browser, path) as v:
        check(v)
        assert {f'{n}/{n}.html' for n in RENDERED} <= set(
            v.do("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
        )
        details = v.page.locator('summary').first
        details.focus()
        v.page.keyboard.press('Enter')  # opened by the keyboard
        assert v.page.locator('details').first.evaluate('d => d.open')
    narrow(browser, path)


@pytest.mark.parametrize('name', ['20_finetune', '46_cost'])  # with formulas, tables, figures
def test_a_rendered_notebook(name, browser):
    path = ROOT / 'reports' / name / f'{name}.html'
    with Visit(browser, path) as v:
        check(v)
        assert (
            v.do(
                "[...document.querySelectorAll('math')].filter(m => m.getBoundingClientRect().width > 0).length"
            )
            > 0
        )
        assert '$' not in v.do(
            "(() => {const m = document.querySelector('main').cloneNode(true); m.querySelectorAll('pre, code').forEach(e => e.remove()); return m.textContent})()"
        )
        assert v.page.locator('details').first.evaluate('d => !d.open')
    narrow(browser, path)


def test_pages_are_small():
    for path in (
        ROOT / 'reports' / 'index.html',
        *(ROOT / 'reports' / n / f'{n}.html' for n in RENDERED),
    ):
        assert path.stat().st_size < KEEP, f'{path.name} is too large to commit'


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    "A small repository with hostile names: a report with everything, one with nothing, a notebook that was never run"
    from PIL import Image

    from mope_clip.data.files import png
    from mope_clip.report.page import write_page
    from mope_clip.report.results import Results, write_index

    monkeypatch.setenv('MOPE_CLIP_DATA', str(tmp_path / 'data'))
    for d in ('data', 'nbs', 'reports/40_all', 'reports/50_none'):
        (tmp_path / d).mkdir(parents=True)
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\n')
    (tmp_path / 'data' / 'README.md').write_text('data')
    picture = png(Image.new('RGB', (1600, 300), 'teal'))['bytes']
    (tmp_path / 'reports' / '40_all' / 'wide_one.png').write_bytes(picture)
    (tmp_path / 'reports' / '40_all' / 'wide_one.csv').write_text('a\n1\n')

    def cell(kind, source, outputs=(), tags=()):
        return dict(
            cell_type=kind,
            id=f'{kind}-{abs(hash(source))}',
            metadata=dict(tags=list(tags)),
            source=source,
            **(dict(execution_count=1, outputs=list(outputs)) if kind == 'code' else {}),
        )

    def shown(kind, data):
        return dict(output_type='display_data', metadata={}, data={kind: data})

    long = 'a_name_without_any_place_to_break_it_' * 6
    table = (
        '<table border="1" class="dataframe"><thead><tr><th></th>'
        + ''.join(f'<th>column {i}</th>' for i in range(30))
        + '</tr></thead><tbody><tr><th>row</th>'
        + '<td>1.5</td>' * 30
        + '</tr></tbody></table>'
    )
    cells = [
        cell(
            'markdown',
            f'# {long} <b>& "all"</b>\n> Purpose.\n\n$$\\text{{kept}} = \\frac{{a}}{{b}} {"+ x_1" * 60}$$\n\nSee [data](../data/README.md), [next](60_later.ipynb), [none](50_none.ipynb). {long}',
        ),
        cell('code', "task: str = ''", tags=['parameters']),
        cell('markdown', f'## {long}\n\n`{long}`'),
        cell(
            'code',
            f"x = '{long * 3}'\nsave_figure(fig, out, 'wide_one', df)",
            [
                shown('image/png', base64.b64encode(picture).decode()),
                shown('text/html', table),
                shown('text/markdown', '- **does not hold**: $Z$'),
                dict(output_type='stream', name='stdout', text=long * 3),
                dict(output_type='stream', name='stderr', text='warned'),
            ],
        ),
    ]

    def write(folder, name, cells):
        (tmp_path / folder / f'{name}.ipynb').write_text(
            json.dumps(dict(nbformat=4, nbformat_minor=5, metadata={}, cells=cells))
        )

    for folder in ('nbs', 'reports/40_all'):
        write(folder, '40_all', cells)
    for folder in ('nbs', 'reports/50_none'):
        write(folder, '50_none', [cell('markdown', '# Nothing here')])
    write('nbs', '60_later', [cell('markdown', '# Later & <later>\n> Not yet.')])
    r = Results('40_all', tmp_path / 'reports' / '40_all', {})
    for holds in (True, False, None):
        r.claim(
            f'c{holds}',
            holds,
            -12345.678,
            f'{long} < 3',
            f'<script>alert(1)</script> {long}',
            -13000,
            -12000,
        )
    r.rows.append(
        dict(
            task='toy',
            split='test',
            method='mope',
            tower='both',
            size=1,
            stage='end',
            seed=0,
            metric='mean_recall',
            value=1.0,
            se=None,
        )
    )
    r.write()
    Results('50_none', tmp_path / 'reports' / '50_none', {}).write()
    write_index()
    write_page()
    return tmp_path / 'reports'


def test_a_made_up_repository(made_up, browser):
    for path in (
        made_up / 'index.html',
        made_up / '40_all' / '40_all.html',
        made_up / '50_none' / '50_none.html',
    ):
        with Visit(browser, path) as v:
            check(v)
        narrow(browser, path)
    with Visit(browser, made_up / 'index.html') as v:
        text = v.do('document.body.innerText')
        assert (
            '2 of 3 reports were run: 2 fresh, 0 stale' in text
            and 'Later & <later>' in text
            and '<script>alert(1)</script>' in text
            and '−12,346 (−13,000 to −12,000)' in text
        )


def test_the_checks_see_what_they_are_for(made_up, browser):
    "A page that asks for a file elsewhere, jumps a heading or lacks a picture fails"
    path = made_up / 'index.html'
    good = path.read_text()
    with Visit(browser, path) as v:
        check(v)
    for old, new in (
        ('<footer>', '<footer><img src="https://example.invalid/a.png" alt="elsewhere">'),
        ('<h2 id="reading">', '<h4>jumped</h4><h2 id="reading">'),
        ('40_all/wide_one.png"', '40_all/gone.png"'),
        ('href="#reading"', 'href="#nowhere"'),
        ('scope="col"', ''),
        ('<a class="skip"', '<a href="runs.csv">first</a><a class="skip"'),
        ('lang="en"', ''),
    ):
        assert old in good
        path.write_text(good.replace(old, new))
        with Visit(browser, path) as v, pytest.raises(AssertionError):
            check(v)
    path.write_text(good.replace('<footer>', '<footer><p style="width: 500px">wide</p>'))
    with pytest.raises(AssertionError, match='scrolls sideways'):
        narrow(browser, path)


def test_all_reports_by_one_command(tmp_path):
    "What is missing is run in order, a failure does not stop the others, and the same command goes on"
    for d in ('data', 'nbs', 'reports'):
        (tmp_path / d).mkdir()
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\n')

    def template(name, last):
        code = f"from pathlib import Path\nfrom mope_clip.report import Results\nout = Path(out_dir); out.mkdir(parents=True, exist_ok=True)\nr = Results('{name}', out, {{}}); r.claim('a', True, 1., 'a rule', 'a finding')\n{last}\nr.write()"
        cells = [dict(cell_type='markdown', id='a', metadata={}, source=f'# {name}')] + [
            dict(
                cell_type='code',
                id=i,
                metadata=dict(tags=t),
                execution_count=None,
                outputs=[],
                source=s,
            )
            for i, t, s in (('b', ['parameters'], "out_dir: str = ''"), ('c', [], code))
        ]
        (tmp_path / 'nbs' / f'{name}.ipynb').write_text(
            json.dumps(
                dict(
                    nbformat=4,
                    nbformat_minor=5,
                    metadata=dict(
                        kernelspec=dict(name='python3', display_name='python3', language='python')
                    ),
                    cells=cells,
                )
            )
        )

    def do():
        return run(
            sys.executable,
            '-m',
            'mope_clip.cli',
            'report',
            '--all',
            MOPE_CLIP_DATA=str(tmp_path / 'data'),
        )

    template('40_fails', "raise ValueError('no such data')")
    template('50_works', '')
    r = do()
    assert (
        r.returncode == 1
        and '2 to run, 0 fresh' in r.stdout
        and '40_fails: not run yet: unknown' in r.stdout
    )
    assert (
        r.stderr.strip().splitlines()[-1]
        == 'mope: 1 failed: 40_fails (ValueError: no such data). The same command goes on with what is missing.'
    )
    results = json.loads((tmp_path / 'reports' / '50_works' / 'results.json').read_text())
    assert results['scale'] == 'full' and not (tmp_path / 'reports' / '40_fails').exists()
    page = (tmp_path / 'reports' / 'index.html').read_text()
    assert (
        'a finding' in page
        and 'mope report 40_fails' in page
        and (tmp_path / 'reports' / '50_works' / '50_works.html').is_file()
    )
    before = (tmp_path / 'reports' / '50_works' / 'results.json').stat().st_mtime_ns
    template('40_fails', '')
    r = do()
    assert r.returncode == 0 and '1 to run, 1 fresh' in r.stdout and '50_works' not in r.stdout, (
        r.stderr[-2000:]
    )
    assert before == (tmp_path / 'reports' / '50_works' / 'results.json').stat().st_mtime_ns
    assert '0 to run, 2 fresh' in do().stdout
