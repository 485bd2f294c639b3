"Below the results: what a test has to show, recorded as its property `show`. A print would be lost where tests run in several processes"

def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports('passed'):
        for name,text in report.user_properties:
            if name == 'show': terminalreporter.section(report.nodeid); terminalreporter.write_line(text)
