"""Takes corrected gains of layers (`quantization.gain_correction`) where a network that loses much gains from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qconv.config.recipe import Recipe
from qconv.data.loader import Batch, count_images
from qconv.errors import Change, Skipped, format_count
from qconv.quantization.gain_correction import STEP, correct_gains
from qconv.reporter import Reporter
from qconv.search.candidate import FoldedNetwork, QuantizationSolution
from qconv.search.output_noise import OutputNoise, noise_change_db
from qconv.search.precision_choice import LEAST_WORTH_DB, POOR_DB

MOST_IMAGES = 16
"""Images that lines are fitted on, evenly out of those that ranges are chosen on: more tell hardly more."""


@dataclass(frozen=True, slots=True)
class GainTrial:
    """feeds: images that lines are fitted on. apart: measures on images that nothing was chosen on."""

    feeds: Sequence[Batch]
    apart: OutputNoise

    @property
    def some_feeds(self) -> Sequence[Batch]:
        """The batches of up to MOST_IMAGES."""
        every = len(self.feeds)
        wanted = -(-MOST_IMAGES * every // max(1, sum(map(count_images, self.feeds))))
        return [self.feeds[index * every // wanted] for index in range(min(wanted, every))]

    def correct(
        self, solution: QuantizationSolution, folded: FoldedNetwork, recipe: Recipe, reporter: Reporter
    ) -> None:
        """Correct the gains of a solution in place, where it has less than POOR_DB and gains LEAST_WORTH_DB."""
        plan, params = solution.plan, solution.params
        before = self.apart.of(folded, recipe, params)
        if before <= 10 ** (-POOR_DB / 10):
            return
        layers, changed = correct_gains(folded.model, plan, params, self.some_feeds, recipe.threads, reporter)
        if not changed:
            return
        after = self.apart.of(folded, recipe, replace(params, layers=layers))
        change = noise_change_db(before, after)
        if not -change >= LEAST_WORTH_DB:
            why = f"left as they are: corrected gains of outputs change the noise by {change:+.1f} dB"
            solution.findings.append(Skipped(STEP, "all layers", why))
            return
        params.layers[:] = layers
        what = f"gains of outputs corrected: noise at the outputs {change:+.1f} dB"
        solution.findings.append(Change(STEP, format_count(changed, "layer"), what, "gains corrected"))
