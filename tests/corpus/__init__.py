"""Programs as Pyro's users write them, and the house rules that hold for each of them.

One file holds programs of a kind. A program is a function that builds it anew, with its parameters at their start:

    @program(declines={"encode": "no local latents"})
    def coin() -> Pair:
        '''The chance of heads, by a guide of its own parameters.'''
        def model(x): ...
        def guide(x): ...
        return Pair(model, guide, (x,))

`corpus.asked` fits it beside `pyro.infer.SVI` and asks every question; `test_corpus.py` runs the fast part, and
`make corpus` writes the table.
"""

from corpus.form import CORPUS, Case, Pair, program

__all__ = ["CORPUS", "Case", "Pair", "program"]
