"""What is special to an operating system: how it opens, reads, locks and maps, and what it says about a process.

Linux's calls are made directly where they are there; elsewhere each has a way of its own here. Nothing above this
folder imports a module, or calls a function of `os`, that another system lacks.
"""
