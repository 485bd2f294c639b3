"What pyproject.toml leaves open about the package, read from settings.ini"
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

read = lambda p: (Path(__file__).parent/p).read_text(encoding='utf8')
cfg = ConfigParser(delimiters='=')
cfg.read_string(read('settings.ini'))
cfg = cfg['DEFAULT']
lib = cfg['lib_name']
version = re.search('__version__ = "(.*)"', read(f'{lib}/__init__.py'))[1]
repo = re.search('Repository = "(.*)"', read('pyproject.toml'))[1]
# README's links are relative, as GitHub likes them. On PyPI they have to lead to the files of this version
def absolute(m): return f"{m[1]}{m[2]}{repo}/{'raw' if m[1] else 'blob'}/{version}/"
readme = re.sub(r'(!?)(\[[^]]*\]\()(?!\w+:|#)', absolute, read('README.md'))

setup(
    version=version, description=cfg['description'], keywords=cfg['keywords'], license=cfg['license'],
    author=cfg['author'], author_email=cfg['author_email'],
    long_description=readme, long_description_content_type='text/markdown',
    classifiers=['Development Status :: 4 - Beta', 'Intended Audience :: Developers',
                 'Intended Audience :: Science/Research', 'Operating System :: OS Independent',
                 'Programming Language :: Python :: 3', 'Programming Language :: Python :: 3 :: Only',
                 *(f'Programming Language :: Python :: {v}' for v in cfg['pythons'].split()),
                 'Topic :: Scientific/Engineering :: Artificial Intelligence', 'Typing :: Typed'],
    packages=[lib], package_data={lib: ['py.typed']}, install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': f'{lib}={lib}._modidx:d'},
)
