"The demo in a small setting"
from tests.tools.demo import main

def test_demo(tmp_path, capsys):
    results = main.__wrapped__(epochs=1, bs=128, chart=tmp_path/'demo.png')
    assert [*results] == ['as a table','as images']
    for scores,times in results.values():
        for o in ('train_loss','valid_loss'): assert abs(scores[o]['Adam']/scores[o]['adam_jit'] - 1).max() < 1e-4
        assert abs(scores['accuracy']['Adam']-scores['accuracy']['adam_jit']).max() < 0.006  # two of 360 images
        assert (times > 0).all(axis=None)
    assert (tmp_path/'demo.png').read_bytes()[:4] == b'\x89PNG' and str(tmp_path/'demo.png') in capsys.readouterr().out
