"A plugin of pytest: a line of JSON for each test as it ends, in the file TESTLOG: a run cut short loses nothing"
import json,os

def _put(test, outcome, when, seconds, text):
    if 'PYTEST_XDIST_WORKER' in os.environ: return  # the process that started them reports, too
    line = dict(part='tests', kind='test', test=test, outcome=outcome, when=when, seconds=seconds, text=text[-2500:])
    with open(os.environ['TESTLOG'], 'a') as f: f.write(json.dumps(line)+'\n')

def pytest_runtest_logreport(report):
    if report.when != 'call' and report.outcome == 'passed': return
    text = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr or '')
    _put(report.nodeid, report.outcome, report.when, round(report.duration, 2), text)

def pytest_collectreport(report):
    if report.outcome == 'failed': _put(report.nodeid, 'failed', 'collect', 0, str(report.longrepr))
