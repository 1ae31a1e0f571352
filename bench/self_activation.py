"""Scoring explanations by their own words, against writing four texts from each and scoring these.

    python bench/self_activation.py [--preset smollm2-135m] [--written 24] [--candidates 768] [--repeats 1]
                                    [--cpu-time] [--json FILE]

The candidates are those that the recorded run has sampled in its last round. Both ways take the preset's batches, with
the writer that is the target itself: texts are written and scored as `run` does it, and own words are read as
`reward: self` reads them, beside a hundred other features. Recorded is the ratio of seconds for a candidate, theirs to
ours. Fails where it is below 40.
"""
import sys
from record import finish, in_turns, model_options, row
from saeexplainer.features import load_features
from saeexplainer.lm.sampling import seed_for
from saeexplainer.prefs import preference_prompt
from saeexplainer.presets import data_dir, load_preset
from saeexplainer.replies import Request
from saeexplainer.results import Results
from saeexplainer.self_activation import known_maxima, own_words, rivals_of
from saeexplainer.target import Target
from saeexplainer.writers.local import LocalWriter


def arguments():
    parser = model_options(__doc__)
    parser.add_argument('--written', type=int, default=24, help='candidates that texts are written from')
    parser.add_argument('--candidates', type=int, default=768, help='those whose own words are read')
    parser.add_argument('--repeats', type=int, default=1)
    return parser.parse_args()


def recorded_candidates(preset, n): # -> [(feature, text)], all different
    rows = Results(data_dir()/preset.name/'results')['candidates'].dropna(subset='text')
    last = rows[rows['round'] == rows['round'].max()]
    distinct = last[last['text'].str.strip() != ''].drop_duplicates(['feature', 'text'])
    return list(zip(distinct['feature'].tolist(), distinct['text']))[:n]

def requests_of(preset, candidates): # -> `Request`s, as a run asks for the texts of candidates
    how = preset.text_sampling
    def asked(place, text):
        prompt = preference_prompt(text)
        seeds = [seed_for(preset.seed, 'bench', place, j) for j in range(preset.n_texts)]
        return [Request(prompt, how.max_tokens, how.temperature, how.top_p, seed) for seed in seeds]
    return [request for place, (_, text) in enumerate(candidates) for request in asked(place, text)]

def by_texts(preset, target, candidates): # -> scores of the texts
    writer = LocalWriter(target.model, target.tokenizer, preset.batch_size)
    replies = writer.write(requests_of(preset, candidates))
    features = [feature for feature, _ in candidates for _ in range(preset.n_texts)]
    return target.scores([reply.text or '' for reply in replies], features)


def main():
    args = arguments()
    preset = load_preset(args.preset, size='full', n_texts=4)
    target = Target.load(preset)
    known = known_maxima(load_features(preset))
    rivals = rivals_of(known, preset.seed)
    candidates = recorded_candidates(preset, args.candidates)
    written = candidates[:args.written]
    ways = dict(texts=lambda: by_texts(preset, target, written),
                own=lambda: own_words(target, candidates, known, rivals))
    seconds, results = in_turns(ways, args.repeats, args.clock)
    of_text = seconds['texts']/len(written)
    of_own = seconds['own']/len(candidates)
    scored = sum(one.score == one.score for one in results['own'])
    print(f'{len(written)} candidates by {len(results["texts"])} texts, {1000*of_text:.0f} ms each; '
          f'{len(candidates)} by their own words, {1000*of_own:.1f} ms each, {scored} with a score')
    what = f'scoring {len(candidates)} explanations by their own words'
    return finish([row(what, 'four written texts each', of_text/of_own, 40.)], args.json)


if __name__ == '__main__': sys.exit(main())
