"Steps run compiled from the first on. Below the results: what a test has to show, recorded as its property `show`. A print would be lost where tests run in several processes"
from fastxtend_jit import script

script.compile_after = 0  # those that come with the library would take the first hundred as plain Python

def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports('passed'):
        for name,text in report.user_properties:
            if name == 'show': terminalreporter.section(report.nodeid); terminalreporter.write_line(text)
