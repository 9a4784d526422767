"""The commands of ``memory3 eval``, each in a module beside what it runs."""

import typer

from flows.evaluating.attribution.command import evaluate_attribution
from flows.evaluating.compare_command import compare_two
from flows.evaluating.harness.command import evaluate_tasks
from flows.evaluating.knowledge.command import evaluate_knowledge
from flows.evaluating.perplexity.command import evaluate_perplexity
from flows.evaluating.retrieval.command import evaluate_retrieval
from flows.evaluating.whole_command import evaluate_all

app = typer.Typer(no_args_is_help=True, help="Measure what a model knows with memory, and without.")
app.command("all")(evaluate_all)
app.command("compare")(compare_two)
app.command("perplexity")(evaluate_perplexity)
app.command("knowledge")(evaluate_knowledge)
app.command("attribution")(evaluate_attribution)
app.command("retrieval")(evaluate_retrieval)
app.command("lm")(evaluate_tasks)
