"""Variants of local_expectation.py in order of promise, by options that differ from its DEFAULTS."""

# Hypotheses. H0: with exact credit thoughts are learned (leg < filler, shuffled > own). Else, where is it lost:
# H1 nothing to read: thoughts hardly depend on the state at first, so the reader ignores them, std_a ~ 0
#    -> sure and varied first: info, unit, spread, entropy;   H2 signal is there but small beside the answer's
#    -> norm, p10, p100, norm_tenth;   H3 collapse onto few tokens -> price;   H4 noise of the other thoughts
#    -> greedy;   H5 sharing of weights hurts -> detach, untied, nogate;   H6 no optimum there, or not reached
#    -> warm (does it keep what straight-through found?).
UNIT = dict(init='unit')
VARIANTS = {
    'filler': dict(method='filler'),                            # control: same computation, nothing said
    'straight': dict(method='straight'),                        # what the gradient gets with the same 24 bits
    'leg': {},                                                  # H0, the plain method
    'info': dict(info=1.),                                      # H1: a sure, balanced code of the state first
    'norm': dict(normalise=True),                               # H2
    'p100': dict(policy_weight=100.),
    'info_norm': dict(info=1., normalise=True),                 # H1 + H2
    'unit_norm': dict(UNIT, normalise=True),                    # H1 + H2: sure from the start
    'warm_norm': dict(warm=1000, normalise=True),               # H6
    'frozen': dict(method='frozen'),                            # control: a random code of the state
    'unit_info_norm_price': dict(UNIT, info=1., normalise=True, price=1.),      # all that helped elsewhere
    'none': dict(method='none'),                                # control: a GPT
    'filler_unit': dict(UNIT, method='filler'),                 # controls of unit
    'straight_unit': dict(UNIT, method='straight'),
    'unit': UNIT,                                               # H1
    'info_norm_greedy': dict(info=1., normalise=True, others='greedy'),         # H1 + H4
    'p10': dict(policy_weight=10.),                             # H2
    'info_tenth': dict(info=.1),                                # H1, less of it
    'info_norm_long': dict(info=1., normalise=True, until=1.),  # H1, to the end
    'price': dict(price=.1),                                    # H3
    'norm_price': dict(normalise=True, price=1.),
    'entropy_norm': dict(entropy=1., normalise=True),           # explore first, reader hears all tokens
    'warm': dict(warm=1000),                                    # H6 at reward's own scale
    'reinforce': dict(method='reinforce'),                      # what exact credit is worth
    'info_norm_detach': dict(info=1., normalise=True, detach=True),     # H5
    'info_norm_untied': dict(info=1., normalise=True, untie=True),      # H5
    'info_norm_nogate': dict(info=1., normalise=True, gate='none'),     # H5: thoughts cannot be passed by
    'unit_spread1_norm': dict(UNIT, spread=1., normalise=True),         # H1: unit without spread
    'norm_greedy': dict(normalise=True, others='greedy'),       # H4
    'frozen_net': dict(method='frozen_net'),                    # control: code by the whole untrained network
    'silent': dict(policy_weight=0.),                           # control: sampled, never paid
    'spread1_norm': dict(spread=1., normalise=True),
}
