"Packaging, from settings.ini alone."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
extras = {
    k.removesuffix('_requirements'): cfg[k].split() for k in cfg if k.endswith('_requirements')
}
extras['all'] = sorted({r for v in extras.values() for r in v})
readme = Path('README.md')
setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    license='MIT',
    packages=find_packages(include=['mope_clip*']),
    package_data=dict(mope_clip=['py.typed']),
    license_files=['LICENSE', 'NOTICE'],
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points=dict(console_scripts=cfg['console_scripts'].split()),
    long_description=readme.read_text(encoding='utf-8') if readme.is_file() else '',
    long_description_content_type='text/markdown',
)
