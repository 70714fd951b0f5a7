# test_adding_an_optimizer.py runs it elsewhere, where the optimizer that it tests exists.
collect_ignore = ["lion_checks.py"]
