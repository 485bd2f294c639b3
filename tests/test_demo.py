"The demo in a small setting, and that its figures are what the front page tells"
import pandas as pd

from tests.tools import demo

def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(demo.CASES, 'table', demo.CASES['table']._replace(epochs=2))
    table,far = demo.main.__wrapped__(rounds=1, cases='table', chart=tmp_path/'demo.png', out=tmp_path/'out')
    assert [*table.index] == [('table',t) for t in ('first_ms',*demo.TIMES)] and (table > 0).all(axis=None)
    assert far.adam_jit['table'] < 1e-4 and far.moved['table'] < 1e-2
    printed = capsys.readouterr().out
    assert str(tmp_path/'demo.png') in printed and 'whole fit, s' in printed and len(printed.splitlines()) < 30
    for f in ('demo.png','out/fits.png','out/fits_narrow.png','out/drift.png'):
        assert (tmp_path/f).read_bytes()[:4] == b'\x89PNG'
    stored = pd.read_csv(tmp_path/'out'/'fits.csv')
    assert stored.contestant.tolist() in (['Adam','adam_jit'], ['adam_jit','Adam'])
    pd.testing.assert_frame_equal(demo.compared(stored), table, rtol=1e-4)

def test_cases():
    "Each can be trained, with equal losses while rounding has had no time to grow"
    for c in demo.CASES.values():
        if c.what.startswith('xresnet'):
            c = c._replace(learner=demo.partial(c.learner, batches=2))
            fits = {f: demo.fit(c, f) for f in (demo.Adam,demo.adam_jit)}
            assert all(len(losses) == 2 for _,losses in fits.values())
            assert abs(fits[demo.Adam][1]-fits[demo.adam_jit][1]).max() < 1e-4
