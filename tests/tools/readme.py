"README.md from nbs/index.ipynb: `python -m tests.tools.readme` writes it, `make test` compares"
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).parent.parent.parent

def _shown(c):
    "A cell without directives; one whose code is not to be seen, as what it printed in Markdown"
    if re.match(r'#\|\s*echo:\s*false', c.source):
        return nbformat.v4.new_markdown_cell('\n\n'.join(o.data['text/markdown'] for o in c.outputs))
    c.source = re.sub(r'^#\|.*\n', '', c.source, flags=re.M)
    return c

def readme():
    "What README.md has to contain"
    nb = nbformat.read(root/'nbs'/'index.ipynb', 4)
    nb.cells = [c for c in nb.cells if not re.match(r'#\|\s*hide\s*$', c.source, re.M)]
    nb.metadata.language_info = dict(name='python')
    nb.cells = [_shown(c) for c in nb.cells]
    md,res = MarkdownExporter().from_notebook_node(nb)
    if res['outputs']:
        raise ValueError('Pictures of the front page have to be files, so that README.md can show them too')
    md = re.sub(r'(\]\(|(?:src|srcset|href)=")(?!\w+:|#)', r'\1nbs/', md)  # links lead from the folder of the notebook
    return re.sub(r'\n{3,}', '\n\n', md).strip() + '\n'

if __name__ == '__main__': (root/'README.md').write_text(readme(), encoding='utf8')
