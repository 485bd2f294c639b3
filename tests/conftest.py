"What holds for all tests: steps run compiled, devices, chance, and what is told at the end"
import pytest
import torch
from fastai.torch_core import set_seed

from tests.cases import DEVICES
from tests.engine import set_compile_after

set_compile_after(0)  # the library's steps are lazy, and would be tested as plain Python only

def pytest_runtest_setup(item):
    "Whatever a test draws, it draws the same each time, by itself or after others"
    set_seed(0)

@pytest.fixture(params=DEVICES)
def dev(request): return request.param

@pytest.fixture
def two_threads():
    "For a test, and then as many as there were"
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(threads)

def pytest_terminal_summary(terminalreporter):
    "What a test has to show is its property `show`: a print would be lost where tests run in several processes"
    for report in terminalreporter.getreports('passed'):
        for name,text in report.user_properties:
            if name == 'show': terminalreporter.section(report.nodeid); terminalreporter.write_line(text)
    if not torch.cuda.is_available():
        terminalreporter.write_line('There is no GPU here, so the cases on CUDA were left out. '
                                    'Its kernels were played on the CPU: tests/test_cuda_*.py')
