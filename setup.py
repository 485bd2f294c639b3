"What pyproject.toml leaves open about the package, read from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

root = Path(__file__).parent
cfg = ConfigParser(delimiters='=')
cfg.read(root/'settings.ini')
cfg = cfg['DEFAULT']
lib = cfg['lib_name']
exec(next(l for l in (root/lib/'__init__.py').read_text().splitlines() if l.startswith('__version__')))

setup(
    version=__version__, description=cfg['description'], keywords=cfg['keywords'], license=cfg['license'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], project_urls={'Documentation': cfg['doc_url']},
    long_description=(root/'README.md').read_text(encoding='utf8'), long_description_content_type='text/markdown',
    classifiers=['Programming Language :: Python :: 3', 'Intended Audience :: Developers', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    packages=[lib], install_requires=cfg['requirements'].split(), extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': f'{lib}={lib}._modidx:d'},
)
