"The page of reports in a real browser, with the network blocked; and the command behind it."

import base64
import json
import shutil
import sys
from itertools import pairwise
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, run
from toy import code, prose, row, write_notebook, write_results

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
LESSONS = sorted(p.stem for p in (ROOT / 'nbs').glob('0*.ipynb'))
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


LOADED = """Promise.all([...document.images].map(image => {
  image.loading = 'eager';
  return image.decode().catch(() => 0);
}))"""
FOCUSED = """(() => {
  const e = document.activeElement, box = e.getBoundingClientRect();
  const image = e.querySelector('img') || {};
  return {
    tag: e.tagName,
    name: e.getAttribute('aria-label') || e.textContent.trim() || image.alt || '',
    href: e.getAttribute('href'),
    outline: getComputedStyle(e).outlineStyle,
    seen: box.right > 0 && box.width > 0,
  };
})()"""


def is_here(url):
    return url.startswith(('file://', 'data:'))


class Visit:
    "A page that was opened offline; what it asked for and what it complained of"

    def __init__(self, browser, path, width=1200, **context):
        self.asked, self.said, self.path = [], [], path
        self.context = browser.new_context(viewport=dict(width=width, height=800), **context)
        self.context.route(lambda url: not is_here(url), lambda route: route.abort())
        self.page = self.context.new_page()
        self.page.on('request', self.note_request)
        self.page.on('requestfailed', lambda r: self.said.append(f'failed: {r.url[:200]}'))
        self.page.on('console', self.note_message)
        self.page.on('pageerror', lambda e: self.said.append(str(e)))
        self.page.goto(path.as_uri())
        self.page.evaluate(LOADED)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def note_request(self, request):
        if not is_here(request.url):
            self.asked.append(request.url)

    def note_message(self, message):
        if message.type in ('error', 'warning'):
            self.said.append(message.text)

    def do(self, script):
        return self.page.evaluate(script)

    def all(self, selector, of):
        "What a function makes of every element"
        return self.do(f"[...document.querySelectorAll('{selector}')].map({of})")

    def odd(self, selector, is_odd):
        "How many elements are as they should not be"
        return self.do(f"[...document.querySelectorAll('{selector}')].filter({is_odd}).length")

    def focused(self):
        "What the next press of the tab key reaches"
        self.page.keyboard.press('Tab')
        return self.do(FOCUSED)


def check_links(page, hrefs):
    "Whatever a page leads to is there"
    for href in hrefs:
        if href.startswith(('http:', 'https:', 'mailto:')):
            continue  # for the reader to follow; a page does not load it
        part = urlsplit(href)
        target = page.parent / unquote(part.path) if part.path else page
        assert target.exists(), f'{page.name} links to {href}, which is not there'
        if part.fragment:
            assert f'id="{unquote(part.fragment)}"' in target.read_text(encoding='utf-8'), (
                f'{page.name} links to {href}, but {target.name} has no such place'
            )


def check(visit):
    "What every page must be"
    do = visit.do
    assert visit.asked == [] and visit.said == []
    assert do('document.compatMode') == 'CSS1Compat'
    assert do('document.documentElement.lang') == 'en' and len(do('document.title')) > 5
    assert [len(visit.all(tag, 'e => 1')) for tag in ('main', 'h1', 'title')] == [1, 1, 1]
    assert visit.all('script, iframe, object, link[rel=stylesheet]', 'e => e.tagName') == []
    levels = visit.all('h1, h2, h3, h4, h5, h6', 'e => +e.tagName[1]')
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels)), levels
    assert visit.odd('img', 'e => !e.complete || !e.naturalWidth') == 0
    assert visit.odd('img', 'e => !(e.alt || "").trim()') == 0
    named = 'e.textContent.trim() || (e.querySelector("img") || {}).alt'
    assert visit.odd('a', f'e => !({named})') == 0
    assert visit.odd('th', 'e => !e.scope || !e.textContent.trim()') == 0
    assert visit.odd('table', 'e => !e.querySelector("th")') == 0
    ids = visit.all('[id]', 'e => e.id')
    assert len(ids) == len(set(ids))
    check_links(visit.path, visit.all('a[href]', 'e => e.getAttribute("href")'))
    first = visit.focused()
    assert first['href'] == '#main' and first['seen'] and first['outline'] != 'none', first
    visit.page.keyboard.press('Enter')
    assert do('document.activeElement.id') == 'main'
    for _ in range(6):
        stop = visit.focused()
        if stop['tag'] == 'BODY':
            break  # the end of a short page
        assert stop['name'] and stop['seen'] and stop['outline'] != 'none', stop


BRIGHTNESS = """['color', 'backgroundColor'].map(name =>
  getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0))"""


def narrow(browser, path):
    "No page is wider than a small phone, in the light or in the dark, with everything opened"
    for scheme in ('light', 'dark'):
        with Visit(browser, path, width=360, color_scheme=scheme) as v:
            v.do("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert v.do('document.documentElement.scrollWidth') <= 360, (
                f'{path.name} scrolls sideways on a phone'
            )
            assert v.do('parseFloat(getComputedStyle(document.body).fontSize)') >= 16
            ink, paper = v.do(BRIGHTNESS)
            assert (ink < paper) == (scheme == 'light')


def test_the_committed_page(browser):
    path = ROOT / 'reports' / 'index.html'
    with Visit(browser, path) as v:
        check(v)
        links = set(v.all('a', 'e => e.getAttribute("href")'))
        assert {f'{n}/{n}.html' for n in RENDERED} <= links
        assert {f'lessons/{n}.html' for n in LESSONS} <= links
        details = v.page.locator('summary').first
        details.focus()
        v.page.keyboard.press('Enter')  # opened by the keyboard
        assert v.page.locator('details').first.evaluate('d => d.open')
    narrow(browser, path)


WITHOUT_CODE = """(() => {
  const main = document.querySelector('main').cloneNode(true);
  main.querySelectorAll('pre, code').forEach(e => e.remove());
  return main.textContent;
})()"""


@pytest.mark.parametrize('name', ['20_finetune', '46_cost'])  # with formulas, tables, figures
def test_a_rendered_notebook(name, browser):
    path = ROOT / 'reports' / name / f'{name}.html'
    with Visit(browser, path) as v:
        check(v)
        assert v.odd('math', 'e => e.getBoundingClientRect().width > 0') > 0
        assert '$' not in v.do(WITHOUT_CODE)
        assert v.page.locator('details').first.evaluate('d => !d.open')
    narrow(browser, path)


@pytest.mark.parametrize('name', ['02b_blocks', '04e_mope', '07j_pictures'])
def test_a_lesson(name, browser):
    path = ROOT / 'reports' / 'lessons' / f'{name}.html'
    with Visit(browser, path) as v:
        check(v)
        assert v.odd('.input', 'e => e.getBoundingClientRect().width > 0') > 0
        assert '$' not in v.do(WITHOUT_CODE)
    narrow(browser, path)


@pytest.mark.parametrize('name', LESSONS)
def test_a_lesson_leads_somewhere(name):
    bs4 = pytest.importorskip('bs4', reason="pip install 'mope_clip[dev]'")
    path = ROOT / 'reports' / 'lessons' / f'{name}.html'
    page = bs4.BeautifulSoup(path.read_text(encoding='utf-8'), 'html.parser')
    check_links(path, [a['href'] for a in page.find_all('a', href=True)])
    assert len(page.find_all('h1')) == 1


def test_pages_are_small():
    for path in (
        ROOT / 'reports' / 'index.html',
        *(ROOT / 'reports' / n / f'{n}.html' for n in RENDERED),
        *(ROOT / 'reports' / 'lessons' / f'{n}.html' for n in LESSONS),
    ):
        assert path.stat().st_size < KEEP, f'{path.name} is too large to commit'


LONG = 'a_name_without_any_place_to_break_it_' * 6


def shown(kind, data):
    "An output of a cell"
    return dict(output_type='display_data', metadata={}, data={kind: data})


def wide_table():
    "What pandas makes of thirty columns"
    heads = ''.join(f'<th>column {i}</th>' for i in range(30))
    return (
        f'<table border="1" class="dataframe"><thead><tr><th></th>{heads}</tr></thead>'
        f'<tbody><tr><th>row</th>{"<td>1.5</td>" * 30}</tr></tbody></table>'
    )


def hostile_cells(picture):
    "Names that do not break, a wide formula, a wide table, and everything a cell can show"
    formula = '$$\\text{kept} = \\frac{a}{b} ' + '+ x_1' * 60 + '$$'
    links = 'See [data](../data/README.md), [next](60_later.ipynb), [none](50_none.ipynb), '
    outputs = [
        shown('image/png', base64.b64encode(picture).decode()),
        shown('text/html', wide_table()),
        shown('text/markdown', '- **does not hold**: $Z$'),
        dict(output_type='stream', name='stdout', text=LONG * 3),
        dict(output_type='stream', name='stderr', text='warned'),
    ]
    return [
        prose(
            f'# {LONG} <b>& "all"</b>\n> Purpose.\n\n{formula}\n\n'
            f'{links}[lesson](01_lesson.ipynb). {LONG}'
        ),
        code("task: str = ''", ['parameters']),
        prose(f'## {LONG}\n\n`{LONG}`'),
        code(f"x = '{LONG * 3}'\nreport.figure(fig, 'wide_one', df)", (), outputs),
    ]


@pytest.fixture
def made_up(toy_repo):
    "Hostile names: a report with everything, one with nothing, a lesson, one that was never run"
    from PIL import Image

    from mope_clip.data.files import png
    from mope_clip.report import write_index, write_page

    (toy_repo / 'data' / 'README.md').write_text('data', encoding='utf-8')
    reports, picture = toy_repo / 'reports', png(Image.new('RGB', (1600, 300), 'teal'))['bytes']
    for folder in ('nbs', 'reports/40_all'):
        write_notebook(toy_repo / folder / '40_all.ipynb', *hostile_cells(picture))
    for folder in ('nbs', 'reports/50_none'):
        write_notebook(toy_repo / folder / '50_none.ipynb', prose('# Nothing here'))
    write_notebook(toy_repo / 'nbs' / '60_later.ipynb', prose('# Later & <later>\n> Not yet.'))
    write_notebook(
        toy_repo / 'nbs' / '01_lesson.ipynb',
        code('#| default_exp lesson'),
        prose('# A lesson\n> How <it> goes.\n\nSee [what came of it](40_all.ipynb).'),
        code('#| export\ndef double(x):\n    return 2 * x'),
        code('#| hide\nhidden = True'),
        code('double(3)', (), [shown('text/html', wide_table())]),
        prose('## Ends\n\n## Ends'),
    )
    (reports / '40_all' / 'wide_one.png').write_bytes(picture)
    (reports / '40_all' / 'wide_one.csv').write_text('a\n1\n', encoding='utf-8')
    found = f'<script>alert(1)</script> {LONG}'
    claims = [
        (f'c{holds}', holds, -12345.678, f'{LONG} < 3', found, -13000, -12000)
        for holds in (True, False, None)
    ]
    write_results(reports / '40_all', '40_all', [row(stage='end')], claims)
    write_results(reports / '50_none', '50_none')
    write_index()
    write_page()
    return reports


def test_a_made_up_repository(made_up, browser):
    for path in (
        made_up / 'index.html',
        made_up / '40_all' / '40_all.html',
        made_up / '50_none' / '50_none.html',
        made_up / 'lessons' / '01_lesson.html',
    ):
        with Visit(browser, path) as v:
            check(v)
        narrow(browser, path)
    with Visit(browser, made_up / 'index.html') as v:
        text = v.do('document.body.innerText')
        assert '2 of 3 reports were run: 2 fresh, 0 stale' in text and 'Later & <later>' in text
        assert '<script>alert(1)</script>' in text
        assert '-12,346 (-13,000 to -12,000)' in text.replace('\N{MINUS SIGN}', '-')
        assert 'A lesson: How <it> goes.' in text


def test_the_checks_see_what_they_are_for(made_up, browser):
    "A page that asks for a file elsewhere, jumps a heading or lacks a picture fails"
    path = made_up / 'index.html'
    good = path.read_text(encoding='utf-8')
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
        path.write_text(good.replace(old, new), encoding='utf-8')
        with Visit(browser, path) as v, pytest.raises(AssertionError):
            check(v)
    path.write_text(
        good.replace('<footer>', '<footer><p style="width: 500px">wide</p>'), encoding='utf-8'
    )
    with pytest.raises(AssertionError, match='scrolls sideways'):
        narrow(browser, path)


FRAME = 'from mope_clip.report import Report\n\nreport = Report(globals())'
BODY = """from mope_clip.data.files import digest
digest('a')
report.goal('a', True, 1.0, 'a finding')
{last}
report.finish()"""


def test_all_reports_by_one_command(tmp_path):
    "What is missing is run in order, a failure stops no other, and the same command goes on"
    for d in ('data', 'nbs', 'reports'):
        (tmp_path / d).mkdir()
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\n', encoding='utf-8')

    def template(name, last):
        parameters = f"out_dir: str = ''  # of {name}"
        cells = code(parameters, ['parameters']), code(FRAME), code(BODY.format(last=last))
        write_notebook(tmp_path / 'nbs' / f'{name}.ipynb', prose(f'# {name}'), *cells)
        (tmp_path / 'nbs' / f'{name}.yaml').write_text(
            'rules: {a: {says: a rule, kind: budget}}\n', encoding='utf-8'
        )

    def do():
        command = (sys.executable, '-m', 'mope_clip.cli', 'report', '--all')
        return run(*command, MOPE_CLIP_DATA=str(tmp_path / 'data'))

    template('40_fails', "raise ValueError('no such data')")
    template('50_works', '')
    r = do()
    assert r.returncode == 1 and '2 to run, 0 fresh' in r.stdout, r.stderr[-2000:]
    assert '40_fails: not run yet: unknown' in r.stdout
    assert r.stderr.strip().splitlines()[-1] == (
        'mope: 1 failed: 40_fails (ValueError: no such data). '
        'The same command goes on with what is missing.'
    )
    stored = tmp_path / 'reports' / '50_works' / 'results.json'
    assert json.loads(stored.read_text(encoding='utf-8'))['scale'] == 'full'
    assert not (tmp_path / 'reports' / '40_fails').exists()
    page = (tmp_path / 'reports' / 'index.html').read_text(encoding='utf-8')
    assert 'a finding' in page and 'mope report 40_fails' in page
    assert (tmp_path / 'reports' / '50_works' / '50_works.html').is_file()
    before = stored.stat().st_mtime_ns
    template('40_fails', '')
    r = do()
    assert r.returncode == 0 and '1 to run, 1 fresh' in r.stdout, r.stderr[-2000:]
    assert '50_works' not in r.stdout and before == stored.stat().st_mtime_ns
    assert '0 to run, 2 fresh' in do().stdout
