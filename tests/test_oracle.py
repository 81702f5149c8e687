"""The C++ reference against numbers worked out by hand.

Logits are written as logarithms, so that the probabilities are round: softmax(log p) = sigmoid(log(p / (1 - p))) = p.
"""

import oracle
import pytest
from numpy import array, einsum, exp, full, inf, log, nan, ones, pi, sqrt, tanh, tile, zeros
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal


def check(actual, expected):
    # not tighter: the 1e-10 in the definition of A is left out of the numbers below, except where it matters.
    assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def sigmoid_logits(*p):
    return log(array(p) / (1 - array(p)))[None]


# --- topk_routing -----------------------------------------------------------------------------------------------------

FOUR = log([[0.1, 0.2, 0.3, 0.4]])


def test_routing_takes_the_largest_and_normalises():
    ids, weights, probs = oracle.topk_routing(FOUR, 2)
    check(probs, [[0.1, 0.2, 0.3, 0.4]])
    assert_array_equal(ids, [[3, 2]])
    check(weights, [[4 / 7, 3 / 7]])  # 0.4 and 0.3 over 0.7


@pytest.mark.parametrize(
    ("p", "expected"),
    [([0.25, 0.25, 0.25, 0.25], [0, 1, 2]), ([0.1, 0.35, 0.1, 0.45], [3, 1, 0]), ([0.1, 0.3, 0.3, 0.3], [1, 2, 3])],
)
def test_routing_ties_go_to_the_lower_expert(p, expected):
    ids, _, _ = oracle.topk_routing(log([p]), 3)
    assert_array_equal(ids, [expected])


def test_routing_vision_token_takes_fewer_experts():
    ids, weights, _ = oracle.topk_routing(tile(FOUR, (3, 1)), 3, vision_mask=[False, True, False], vision_top_k=1)
    assert_array_equal(ids, [[3, 2, 1], [3, 4, 4], [3, 2, 1]])  # 4 = E: unused
    check(weights, [[4 / 9, 3 / 9, 2 / 9], [1, 0, 0], [4 / 9, 3 / 9, 2 / 9]])


def test_routing_vision_top_k_defaults_to_top_k():
    ids, _, _ = oracle.topk_routing(FOUR, 3, vision_mask=[True])
    assert_array_equal(ids, [[3, 2, 1]])


@pytest.mark.parametrize(
    ("vision_top_k", "renormalize", "expected"),
    [
        (2, True, [0.4 * 0.9 / 0.7, 0.3 * 0.9 / 0.7, 0]),  # the original three summed to 0.9
        (1, True, [0.9, 0, 0]),
        (3, True, [0.4, 0.3, 0.2]),  # not reduced
        (2, False, [0.4, 0.3, 0]),
    ],
)
def test_routing_without_norm_keeps_the_original_sum(vision_top_k, renormalize, expected):
    _, weights, _ = oracle.topk_routing(
        tile(FOUR, (2, 1)), 3, vision_mask=[True, False], vision_top_k=vision_top_k, norm_topk_prob=False,
        renormalize=renormalize,
    )  # fmt: skip
    check(weights, [expected, [0.4, 0.3, 0.2]])


def test_routing_renormalize_changes_nothing_where_the_model_normalises():
    _, weights, _ = oracle.topk_routing(FOUR, 3, vision_mask=[True], vision_top_k=2, renormalize=False)
    check(weights, [[4 / 7, 3 / 7, 0]])


def test_routing_scaling_factor_comes_last():
    _, weights, _ = oracle.topk_routing(FOUR, 2, routed_scaling_factor=2.5)
    check(weights, [[2.5 * 4 / 7, 2.5 * 3 / 7]])
    _, weights, _ = oracle.topk_routing(FOUR, 2, norm_topk_prob=False, routed_scaling_factor=2.5)
    check(weights, [[1.0, 0.75]])


@pytest.mark.parametrize(
    ("skip_below", "vision", "exempt", "ids", "weights"),
    [
        # the weights of FOUR's best three are 4/9, 3/9 and 2/9
        ([0.0, 1.0], False, False, [3, 2, 1], [4, 3, 2]),
        ([0.3, 1.0], False, False, [3, 2, 4], [4, 3, 0]),
        ([0.0, 0.4], True, False, [3, 4, 4], [4, 0, 0]),
        ([1.0, 0.4], False, False, [4, 4, 4], [0, 0, 0]),
        ([1.0, 0.4], False, True, [3, 2, 1], [4, 3, 2]),
    ],
)
def test_routing_skips_light_experts(skip_below, vision, exempt, ids, weights):
    options = dict(skip_below=skip_below, vision_mask=[vision], exempt_mask=[exempt], routed_scaling_factor=9.0)
    got = oracle.route(FOUR, 3, **options)
    assert_array_equal(got.ids, [ids])
    check(got.weights, [weights])


def test_routing_skips_what_is_below_and_not_what_is_equal():
    got = oracle.route(log([[0.5, 0.25, 0.25]]), 3, skip_below=[0.25, 0.0])
    assert_array_equal(got.ids, [[0, 1, 2]])
    assert got.skip_gap == [0.0]


def test_routing_skips_in_the_middle_where_a_bias_chooses():
    got = oracle.route(sigmoid_logits(0.1, 0.4, 0.5), 3, scoring="sigmoid", correction_bias=[1, 0, 0],
                       skip_below=[0.3, 0.0])  # fmt: skip
    assert_array_equal(got.ids, [[3, 2, 1]])
    check(got.weights, [[0.0, 0.5, 0.4]])


def test_routing_bias_selects_but_does_not_weigh():
    # s = 0.8 - 0.5, 0.5, 0.2 + 0.4 = 0.3, 0.5, 0.6; the weights are 0.2 and 0.5, over 0.7
    logits, bias = sigmoid_logits(0.8, 0.5, 0.2), [-0.5, 0, 0.4]
    ids, weights, probs = oracle.topk_routing(logits, 2, scoring="sigmoid", correction_bias=bias)
    check(probs, [[0.8, 0.5, 0.2]])
    assert_array_equal(ids, [[2, 1]])
    check(weights, [[2 / 7, 5 / 7]])

    # K_v 1 without norm: expert 2 alone carries the 0.2 + 0.5 of its original two
    ids, weights, _ = oracle.topk_routing(
        logits, 2, scoring="sigmoid", correction_bias=bias, vision_mask=[True], vision_top_k=1, norm_topk_prob=False
    )
    assert_array_equal(ids, [[2, 3]])
    check(weights, [[0.7, 0]])


SIX = log([[0.30, 0.02, 0.22, 0.20, 0.16, 0.10]])  # three groups of two: best 0.30, 0.22, 0.16; sums 0.32, 0.42, 0.26


@pytest.mark.parametrize(
    ("topk_group", "bias", "expected"),
    [
        (1, None, [0, 1]),  # group 0 by its best expert, although expert 1 is the worst of all
        (1, zeros(6), [2, 3]),  # with a bias, group 1 by its two best
        (2, zeros(6), [0, 2]),  # groups 1 and 0
        (3, None, [0, 2]),  # all groups: no restriction
    ],
)
def test_routing_group_limited(topk_group, bias, expected):
    ids, _, _ = oracle.topk_routing(SIX, 2, n_group=3, topk_group=topk_group, correction_bias=bias)
    assert_array_equal(ids, [expected])


def test_routing_groups_of_three_count_their_two_best():
    # sums of two: 0.40 and 0.42; of three they would be 0.59 and 0.43
    logits = sigmoid_logits(0.20, 0.20, 0.19, 0.40, 0.02, 0.01)
    ids, _, _ = oracle.topk_routing(logits, 2, scoring="sigmoid", n_group=2, correction_bias=zeros(6))
    assert_array_equal(ids, [[3, 4]])


@pytest.mark.parametrize(
    ("group_best", "bias", "expected"),
    [(2, None, [2, 3]), (1, zeros(6), [0, 1]), (1, None, [0, 1]), (2, zeros(6), [2, 3])],
)
def test_routing_groups_count_as_many_as_told(group_best, bias, expected):
    ids, _, _ = oracle.topk_routing(SIX, 2, n_group=3, group_best=group_best, correction_bias=bias)
    assert_array_equal(ids, [expected])


def test_routing_groups_of_one_have_one_best():
    ids, _, _ = oracle.topk_routing(FOUR, 2, n_group=4, topk_group=2, correction_bias=zeros(4))
    assert_array_equal(ids, [[3, 2]])


def test_routing_group_ties_go_to_the_lower_group():
    ids, _, _ = oracle.topk_routing(log([[0.3, 0.2, 0.3, 0.2]]), 2, n_group=2)
    assert_array_equal(ids, [[0, 1]])


def test_routing_negative_scores_still_beat_other_groups():
    # s = -0.2, -0.5 | -0.8, -0.8: a gate that masked other groups with 0 would pick 2 and 3
    ids, _, _ = oracle.topk_routing(
        sigmoid_logits(0.8, 0.5, 0.2, 0.2), 2, scoring="sigmoid", correction_bias=-ones(4), n_group=2
    )
    assert_array_equal(ids, [[0, 1]])


def test_routing_original_sum_stays_within_the_chosen_groups():
    # group 0 only: the original two are 0.30 + 0.02
    _, weights, _ = oracle.topk_routing(SIX, 2, n_group=3, vision_mask=[True], vision_top_k=1, norm_topk_prob=False)
    check(weights, [[0.32, 0]])


def test_routing_extreme_logits():
    ids, weights, probs = oracle.topk_routing([[0.0, 1000.0, 1000.0]], 2)
    check(probs, [[0, 0.5, 0.5]])
    assert_array_equal(ids, [[1, 2]])
    ids, weights, probs = oracle.topk_routing(full((1, 3), -1000.0), 2, scoring="sigmoid")
    check(probs, zeros((1, 3)))
    assert_array_equal(ids, [[0, 1]])
    check(weights, zeros((1, 2)))


def test_routing_margins():
    logits = log([[0.10, 0.15, 0.30, 0.45]])
    check(oracle.routing_margin(logits, 3), [[0.05], [inf], [0.15]])  # 0.15 - 0.10; 0.45 - 0.30 = 0.30 - 0.15
    check(oracle.routing_margin(logits, 4), [[inf], [inf], [0.05]])
    # one of three: 0.45 - 0.30; where the original sum matters, also 0.15 - 0.10
    vision = {"vision_mask": [True], "vision_top_k": 1}
    check(oracle.routing_margin(logits, 3, **vision), [[0.15], [inf], [inf]])
    check(oracle.routing_margin(logits, 3, **vision, norm_topk_prob=False), [[0.05], [inf], [inf]])
    check(oracle.routing_margin(SIX, 1, n_group=3), [[0.28], [0.08], [inf]])  # 0.30 - 0.02; groups 0.30 - 0.22


def test_routing_refuses_what_it_cannot_define():
    with pytest.raises(ValueError, match="only 2 experts"):
        oracle.topk_routing(SIX, 3, n_group=3)
    with pytest.raises(ValueError, match="vision_top_k=3"):
        oracle.topk_routing(SIX, 2, vision_top_k=3)


# --- gate_logits ------------------------------------------------------------------------------------------------------


def test_gate_bias_is_scaled_too():
    hidden, weight = [[1, 2], [3, 4]], [[1, 0], [0, 1], [1, 1]]
    check(oracle.gate_logits(hidden, weight), [[1, 2, 3], [3, 4, 7]])
    check(oracle.gate_logits(hidden, weight, bias=[1, 0, -3], logit_scale=0.5), [[1, 1, 0], [2, 2, 2]])


# --- moe_experts ------------------------------------------------------------------------------------------------------

LN3 = log(3)  # sigmoid(ln 3) = 0.75, so silu(ln 3) = 0.75 ln 3 and silu(-ln 3) = -0.25 ln 3


def test_experts_by_hand():
    x = [LN3, 2]
    gate_up = [[[1, 0], [0, 1]], [[-1, 0], [0, 0.5]]]
    # expert 0: gate ln 3, up 2, product 1.5 ln 3, down to (1, 10) of it
    # expert 1: gate -ln 3, up 1, product -0.25 ln 3, down to (4, 0) of it
    down = [[[1], [10]], [[4], [0]]]
    ids = [[0, 1], [1, 2], [-1, 99], [0, 0]]  # no expert: 2 = E, -1, 99
    weights = [[0.5, 2], [1, 7], [1, 1], [0.25, 0.75]]
    output = oracle.moe_experts([x] * 4, gate_up, down, ids, weights)
    check(output, [[0.75 * LN3 - 2 * LN3, 7.5 * LN3], [-LN3, 0], [0, 0], [1.5 * LN3, 15 * LN3]])


def test_experts_gate_rows_come_first():
    # rows: gate ln 3 and 0, up 2 and 5; products 1.5 ln 3 and 0
    output = oracle.moe_experts([[1]], [[[LN3], [0], [2], [5]]], [[[1, 100]]], [[0]], [[1]])
    check(output, [[1.5 * LN3]])


@pytest.mark.parametrize(
    ("activation", "options", "expected"),
    [
        ("silu", {}, 0.75 * LN3 * -3),
        ("clamped_silu", {"limit": 1.0}, -1 / (1 + exp(-1))),  # gate ln 3 is cut to 1, up -3 to -1
        ("clamped_silu", {"limit": 2.0}, 0.75 * LN3 * -2),
        ("silu_clamped", {"limit": 0.5}, 0.5 * -0.5),  # silu(ln 3) = 0.824
        ("silu_clamped", {"limit": 1.0}, 0.75 * LN3 * -1),
        ("oai", {"limit": 4.0, "alpha": 1.0}, 0.75 * LN3 * -2),
        ("oai", {"limit": 4.0, "alpha": 2.0}, 0.9 * LN3 * -2),  # sigmoid(2 ln 3) = 0.9
        ("oai", {"limit": 1.0, "alpha": LN3}, 0),  # -1 + 1
        ("gelu_tanh", {}, 0.5 * LN3 * (1 + tanh(sqrt(2 / pi) * (LN3 + 0.044715 * LN3**3))) * -3),
    ],
)
def test_experts_activations_by_hand(activation, options, expected):
    # gate ln 3, up -3
    output = oracle.moe_experts([[1]], [[[LN3], [-3]]], [[[1]]], [[0]], [[1]], activation=activation, **options)
    check(output, [[expected]])


@pytest.mark.parametrize("activation", ["clamped_silu", "silu_clamped"])
def test_experts_clamp_the_gate_from_above_alone(activation):
    # silu(-ln 3) = -0.25 ln 3, up is cut to -0.1
    output = oracle.moe_experts([[-LN3]], [[[1], [1]]], [[[1]]], [[0]], [[1]], activation=activation, limit=0.1)
    check(output, [[0.025 * LN3]])


def test_experts_without_a_gate():
    output = oracle.moe_experts([[1]], [[[3], [-2]]], [[[1, 100]]], [[0]], [[2]], activation="relu2")
    check(output, [[18]])


def test_experts_with_biases():
    # gate 0 + ln 3, up 1 + 1; the product 1.5 ln 3, plus 10, is what the weight multiplies
    output = oracle.moe_experts([[1]], [[[0], [1]]], [[[1]]], [[0]], [[2]], gate_up_bias=[[LN3, 1]], down_bias=[[10]])
    check(output, [[3 * LN3 + 20]])


def test_experts_with_alternating_rows():
    # rows: gate ln 3, up 2, gate 0, up 5
    output = oracle.moe_experts(
        [[1]], [[[LN3], [0], [0], [5]]], [[[1, 100]]], [[0]], [[1]], interleaved=True, gate_up_bias=[[0, 2, 0, 0]]
    )
    check(output, [[1.5 * LN3]])


def test_experts_equal_a_batched_formula():
    rng = default_rng(0)
    T, H, E, I, K = 7, 5, 3, 4, 2  # noqa: E741
    x, ids, weights = rng.normal(size=(T, H)), rng.integers(0, E + 1, (T, K)), rng.normal(size=(T, K))
    gate_up, down = rng.normal(size=(E, 2 * I, H)), rng.normal(size=(E, H, I))
    gate, up = einsum("eih,th->eti", gate_up[:, :I], x), einsum("eih,th->eti", gate_up[:, I:], x)
    every = einsum("ehi,eti->eth", down, gate / (1 + exp(-gate)) * up)
    per_expert = ((ids[:, :, None] == range(E)) * weights[:, :, None]).sum(1)  # [T, E]
    check(oracle.moe_experts(x, gate_up, down, ids, weights), einsum("te,eth->th", per_expert, every))


# --- last_query_attention ---------------------------------------------------------------------------------------------


def test_attention_maps_query_heads_to_key_heads():
    # scale * q = 1 or 0: the scores are the keys (0, ln 3 and ln 9, 0) or zeros
    query = array([2.0, 0, 2, 2]).reshape(1, 4, 1)
    key = array([[0, LN3], [2 * LN3, 0]]).reshape(1, 2, 2, 1)
    # heads 0, 1 read key head 0: (1/4, 3/4), (1/2, 1/2); heads 2, 3 key head 1: (9/10, 1/10) twice
    check(oracle.last_query_attention(query, key, 0.5), [[(0.25 + 0.5 + 0.9 + 0.9) / 4, (0.75 + 0.5 + 0.1 + 0.1) / 4]])


def test_attention_sees_valid_keys_only():
    query = ones((2, 1, 1))
    key = array([[0, LN3, 50], [0, LN3, 50]]).reshape(2, 1, 3, 1)
    probs = oracle.last_query_attention(query, key, 1.0, [[True, True, False], [False, False, False]])
    check(probs, [[0.25, 0.75, 0], [0, 0, 0]])


def test_attention_rows_of_the_mask_belong_to_query_heads():
    # scores 0 and ln 3 for every head; heads 0 and 1 see the first key, head 2 and 3 both
    query, key = ones((1, 4, 1)), array([0, LN3]).reshape(1, 1, 2, 1)
    mask = array([[[True, False], [True, True]]])
    check(oracle.last_query_attention(query, key, 1.0, mask), [[(1 + 1 + 0.25 + 0.25) / 4, (0.75 + 0.75) / 4]])
    # of two key heads each is read by one query head that sees nothing: it adds nothing
    mask = array([[[True, True], [False, False]] * 2])
    check(oracle.last_query_attention(query, key.repeat(2, axis=1), 1.0, mask), [[0.25 / 2, 0.75 / 2]])


def test_attention_sinks_take_a_share():
    # scores 0 and ln 3; sinks ln 4 and ln 16, untouched by the scale: 1/8, 3/8 and 1/20, 3/20
    query, key = ones((1, 2, 1)), array([0, LN3 / 0.5]).reshape(1, 1, 2, 1)
    sinks = [2 * log(2), 4 * log(2)]
    check(oracle.last_query_attention(query, key, 0.5, sinks=sinks), [[(1 / 8 + 1 / 20) / 2, (3 / 8 + 3 / 20) / 2]])
    check(oracle.last_query_attention(query, key, 0.5, zeros((1, 2)), sinks), zeros((1, 2)))


def test_attention_equals_a_batched_formula():
    rng = default_rng(1)
    query, key = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 2, 5, 3))
    score = exp(0.7 * einsum("bhd,bhnd->bhn", query, key.repeat(2, axis=1)))
    expected = (score / score.sum(-1, keepdims=True)).mean(1)
    check(oracle.last_query_attention(query, key, 0.7), expected)


# --- prune_plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "keep_ratio", "merge_ratio", "window", "expected"),
    [
        ([10], 0.5, 0.2, 3, (5, 1)),  # merged = min(1, 4 - 1, 5 // 2)
        ([1792], 0.5 ** (1 / 3), 0.025, 3, (1422, 35)),  # 1422.3; 35.55
        ([100], 0.29, 0.0, 3, (28, 0)),  # 100 * 0.29 is 28.999999999999996 in double
        ([3], 0.1, 1.0, 3, (1, 0)),  # at least one token; windows - 1 = 0
        ([1], 0.1, 1.0, 3, (1, 0)),  # one token is never pruned
        ([], 0.5, 0.5, 3, (0, 0)),
        ([7], 1.0, 1.0, 3, (7, 0)),  # target = n_vis: no pruning, no merge
        ([10], 0.95, 1.0, 2, (9, 1)),  # min(9, 4, 1 // 1)
        ([6], 0.34, 1.0, 3, (2, 1)),  # bound by windows - 1: min(2, 1, 4 // 2)
        ([2, 2, 2], 0.34, 1.0, 3, (2, 2)),  # the same tokens in three windows: min(2, 2, 2)
        ([10], 0.8, 0.5, 3, (8, 1)),  # bound by the tokens to lose: min(4, 3, 2 // 2)
        ([10], 0.9, 0.5, 3, (9, 0)),  # 1 // 2
        ([4], 0.5, 1.0, 1, (2, 2)),  # W = 1: min(2, 3, 2 // 1)
    ],
)
def test_plan(runs, keep_ratio, merge_ratio, window, expected):
    assert oracle.prune_plan(runs, keep_ratio, merge_ratio, window) == expected


# --- window_redundancy ------------------------------------------------------------------------------------------------

# one sample, T = text: T V V V V T V V; with W = 3 its windows are (1, 2, 3), (4), (6, 7)
VISION = array([[0, 1, 1, 1, 1, 0, 1, 1]], bool)
VALID = ones((1, 8), bool)
PROBS = array([[[9, 9], [1, 0], [1, 0], [0, 1], [0.3, 0.4], [9, 9], [1, 0], [0, 1]]])
IMPORTANCE = array([[9, 0.1, 0.2, 0.3, 0.4, 9, 0.1, 0.0]])
# window 0: mean (2, 1) / 3; cosines 2, 2, 1 over sqrt 5; their mean is sqrt(5) / 3 = 0.7454
# window 1: one token, 0.   window 2: mean (1, 1) / 2; both cosines are sqrt(1/2) = 0.7071
S = array([sqrt(5) / 3, 0, sqrt(0.5)])
# means 0.2, 0.4, 0.05 over the largest, 0.4
A = array([0.5, 1.0, 0.125])


@pytest.mark.parametrize(
    ("strategy", "C"),
    [("hybrid", 0.25 * S - 0.75 * A), ("routing_similarity", S), ("dynamic_attention", -A)],
)
def test_redundancy_by_hand(strategy, C):
    result = oracle.window_redundancy(PROBS, IMPORTANCE, VISION, VALID, window=3, alpha=0.25, strategy=strategy)
    check(result, [S, A, C])


def test_redundancy_per_sample_in_batch_order():
    # sample 0: V V V V; sample 1: no vision; sample 2: two of padding (marked as vision, yet no tokens), then V V
    vision = array([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    valid = array([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]], bool)
    probs = array([[[1, 0], [1, 0], [1, 0], [0, 1]], full((4, 2), nan), [[nan, nan], [nan, nan], [1, 0], [1, 0]]])
    importance = array([[1, 3, 5, 3], full(4, nan), [nan, nan, 0.1, 0.3]])
    s, a, c = oracle.window_redundancy(probs, importance, vision, valid, window=2, alpha=0.5, strategy="hybrid")
    check(s, [1, sqrt(0.5), 1])
    check(a, [0.5, 1, 1])  # means 2 and 4 over 4; 0.2 over 0.2
    check(c, [0.25, sqrt(0.5) / 2 - 0.5, 0])


def test_redundancy_importance_has_a_floor():
    # the largest window mean is 1e-10: A = 1e-10 / (1e-10 + 1e-10); without attention at all A = 0
    options = {"window": 2, "alpha": 0.5, "strategy": "dynamic_attention"}
    vision = ones((1, 2), bool)
    _, a, _ = oracle.window_redundancy(ones((1, 2, 3)), full((1, 2), 1e-10), vision, None, **options)
    check(a, [0.5])
    _, a, _ = oracle.window_redundancy(ones((1, 2, 3)), zeros((1, 2)), vision, None, **options)
    check(a, [0])


# --- prune_tokens -----------------------------------------------------------------------------------------------------

# six vision tokens: target 3 = int(6 * 0.5), merged 1 = min(int(3 * 0.4), 3 - 1, 3 // 2), so two are kept as they are
HALF = {"keep_ratio": 0.5, "merge_ratio": 0.4, "window": 3}
HIDDEN = array([[[1, 1], [2, 0], [4, 0], [0, 3], [5, 5], [6, 6], [3, 0], [0, 4]]], float)
RESIDUAL = array([[[-1, 1], [0, 3], [0, 3], [0, 3], [7, 7], [8, 8], [0, 6], [8, 0]]], float)


def prune(strategy="hybrid", alpha=0.5, merge_method="mlerp", **options):
    return oracle.prune_tokens(
        HIDDEN, RESIDUAL, PROBS, IMPORTANCE, VISION, VALID, alpha=alpha, strategy=strategy, merge_method=merge_method,
        **{**HALF, **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "alpha", "index", "merged"),
    [
        # C = 0.1227, -0.5, 0.2911: merge (6, 7); of 1, 2, 3, 4 keep those with attention 0.3, 0.4
        ("hybrid", 0.5, [0, 3, 4, 5, 6], [0, 0, 0, 0, 1]),
        # C = 0.6831, -0.05, 0.6655: merge (1, 2, 3); of 4, 6, 7 keep those with attention 0.4, 0.1
        ("hybrid", 0.95, [0, 1, 4, 5, 6], [0, 1, 0, 0, 0]),
        # C = 0.7454, 0, 0.7071: merge (1, 2, 3); |p| of 4, 6, 7 is 0.5, 1, 1
        ("routing_similarity", 0.5, [0, 1, 5, 6, 7], [0, 1, 0, 0, 0]),
        # C = -0.5, -1, -0.125: merge (6, 7)
        ("dynamic_attention", 0.5, [0, 3, 4, 5, 6], [0, 0, 0, 0, 1]),
    ],
)
def test_prune_strategies(strategy, alpha, index, merged):
    hidden, residual, actual_index, actual_merged = prune(strategy, alpha)
    assert_array_equal(actual_index, [index])
    assert_array_equal(actual_merged, [array(merged, bool)])
    untouched = ~actual_merged[0]
    assert_array_equal(hidden[0, untouched], HIDDEN[0, actual_index[0, untouched]])
    assert_array_equal(residual[0, untouched], RESIDUAL[0, actual_index[0, untouched]])


@pytest.mark.parametrize(
    ("merge_method", "merged_hidden", "merged_residual"),
    [
        ("mean", [1.5, 2], [4, 3]),  # of (3, 0), (0, 4) and of (0, 6), (8, 0)
        ("mlerp", [2.4, 3.2], [6.4, 4.8]),  # lengths 2.5 -> 4 and 5 -> 8
    ],
)
def test_prune_merges_each_stream_by_itself(merge_method, merged_hidden, merged_residual):
    hidden, residual, _, _ = prune(merge_method=merge_method)
    check(hidden, [[[1, 1], [0, 3], [5, 5], [6, 6], merged_hidden]])
    check(residual, [[[-1, 1], [0, 3], [7, 7], [8, 8], merged_residual]])


def test_prune_merges_three():
    # hidden (2, 0), (4, 0), (0, 3): mean (2, 1), longest 4; residual three times (0, 3)
    hidden, residual, _, _ = prune("routing_similarity")
    check(hidden[0, 1], [8 / sqrt(5), 4 / sqrt(5)])
    check(residual[0, 1], [0, 3])


def test_prune_opposite_vectors_merge_to_zero():
    # target 2, merged min(2, 2 - 1, 2 // 1) = 1: the first window, since both have C = 1
    x = array([[[1, 0], [-1, 0], [5, 0], [6, 0]]], float)
    hidden, _, index, _ = oracle.prune_tokens(
        x, x, ones((1, 4, 2)), zeros((1, 4)), ones((1, 4), bool), None, keep_ratio=0.5, merge_ratio=1.0, window=2,
        alpha=1.0, strategy="hybrid", merge_method="mlerp",
    )  # fmt: skip
    assert_array_equal(index, [[0, 2]])
    check(hidden, [[[0, 0], [5, 0]]])


@pytest.mark.parametrize("strategy", ["hybrid", "routing_similarity", "dynamic_attention"])
def test_prune_ties_go_to_the_earlier(strategy):
    # nine equal vision tokens: target 4, merged min(1, 2, 2) = 1; the first window merges, the next three tokens stay
    x = ones((1, 9, 2))
    _, _, index, merged = oracle.prune_tokens(
        x, x, x, full((1, 9), 0.5), ones((1, 9), bool), None, keep_ratio=0.5, merge_ratio=0.25, window=3, alpha=0.5,
        strategy=strategy, merge_method="mean",
    )  # fmt: skip
    assert_array_equal(index, [[0, 3, 4, 5]])
    assert_array_equal(merged, [[True, False, False, False]])


def test_prune_window_of_one_may_merge():
    # V T V V V, window 2: windows (0), (2, 3), (4); the least attention is on (0), which then stands for itself
    vision = array([[1, 0, 1, 1, 1]], bool)
    x = array([[[3.0, 4], [0, 0], [1, 1], [2, 2], [9, 9]]])
    hidden, _, index, merged = oracle.prune_tokens(
        x, x, ones((1, 5, 2)), [[0.1, 9, 0.2, 0.3, 0.9]], vision, None, keep_ratio=0.5, merge_ratio=0.5, window=2,
        alpha=0.5, strategy="dynamic_attention", merge_method="mlerp",
    )  # fmt: skip
    assert_array_equal(index, [[0, 1, 4]])
    assert_array_equal(merged, [[True, False, False]])
    check(hidden, x[:, [0, 1, 4]])


def ragged_batch(padding_side):
    """Four samples of eight positions: the one above; three text tokens; a text and a vision token; no token at all."""
    lengths = [8, 3, 2, 0]
    valid = array([[j < length for j in range(8)] for length in lengths])
    vision = zeros((4, 8), bool)
    vision[0], vision[2, 1] = VISION[0], True
    if padding_side == "left":
        valid, vision[1:] = valid[:, ::-1], vision[1:, ::-1]
    hidden = default_rng(2).normal(size=(4, 8, 2))
    hidden[0] = HIDDEN[0]
    hidden[~valid] = nan
    return hidden, tile(PROBS, (4, 1, 1)), tile(IMPORTANCE, (4, 1)), vision, valid


@pytest.mark.parametrize(
    ("padding_side", "index"),
    [
        ("left", [[0, 3, 4, 5, 6], [-1, -1, 5, 6, 7], [-1, -1, -1, 6, 7], [-1] * 5]),
        ("right", [[0, 3, 4, 5, 6], [0, 1, 2, -1, -1], [0, 1, -1, -1, -1], [-1] * 5]),
    ],
)
def test_prune_ragged_batch(padding_side, index):
    x, probs, importance, vision, valid = ragged_batch(padding_side)
    hidden, residual, actual_index, merged = oracle.prune_tokens(
        x, 2 * x, probs, importance, vision, valid, **HALF, alpha=0.5, strategy="hybrid", merge_method="mlerp",
        padding_side=padding_side,
    )  # fmt: skip
    assert_array_equal(actual_index, index)
    assert merged.sum() == 1 and merged[0, 4]
    check(hidden[0, 4], [2.4, 3.2])
    check(residual, 2 * hidden)
    for b in (1, 2, 3):
        for j, source in enumerate(index[b]):
            assert_array_equal(hidden[b, j], [0, 0] if source < 0 else x[b, source])


def test_prune_keeps_all_at_ratio_one():
    hidden, residual, index, merged = prune(keep_ratio=1.0, merge_ratio=1.0)
    assert_array_equal(hidden, HIDDEN)
    assert_array_equal(residual, RESIDUAL)
    assert_array_equal(index, [range(8)])
    assert not merged.any()


def test_prune_leaves_exactly_the_planned_counts():
    rng = default_rng(3)
    for _ in range(100):
        vision, window = rng.random((1, 40)) < rng.random(), int(rng.integers(1, 6))
        options = {"keep_ratio": rng.random(), "merge_ratio": rng.random(), "window": window}
        x = rng.random((1, 40, 3))
        _, _, index, merged = oracle.prune_tokens(
            x, x, x, rng.random((1, 40)), vision, None, **options, alpha=0.5, strategy="hybrid", merge_method="mean"
        )
        runs = [len(run) for run in "".join(map(str, vision[0].astype(int))).split("0") if run]
        survivors = vision[0, index[0]]
        assert (survivors.sum(), merged.sum()) == oracle.prune_plan(runs, **options)
        assert_array_equal(index[0, ~survivors], (~vision[0]).nonzero()[0])  # text stays, in order
        assert (index[0, 1:] > index[0, :-1]).all()


def test_selection_margins():
    options = {"alpha": 0.5, "strategy": "hybrid"}
    windows, tokens = oracle.selection_margin(PROBS, IMPORTANCE, VISION, VALID, **HALF, **options)
    check(windows, [(sqrt(0.5) / 2 - 0.0625) - (sqrt(5) / 6 - 0.25)])  # windows 2 and 0
    check(tokens, [0.1])  # 0.3 stays, 0.2 goes
    # no merges; 4, 3 and one of the 0.1 and 0.2 stay
    unmerged = {"keep_ratio": 0.5, "merge_ratio": 0.0, "window": 3}
    check(oracle.selection_margin(PROBS, IMPORTANCE, VISION, VALID, **unmerged, **options), [[inf], [0.1]])
    _, _, _, vision, valid = ragged_batch("left")
    windows, tokens = oracle.selection_margin(
        tile(PROBS, (4, 1, 1)), tile(IMPORTANCE, (4, 1)), vision, valid, **HALF, **options
    )
    assert_array_equal(windows[1:], full(3, inf))
    assert_array_equal(tokens[1:], full(3, inf))
    # |p| of 4, 6, 7 is 0.5, 1, 1 and two stay
    options["strategy"] = "routing_similarity"
    windows, tokens = oracle.selection_margin(PROBS, IMPORTANCE, VISION, VALID, **HALF, **options)
    check([windows[0], tokens[0]], [sqrt(5) / 3 - sqrt(0.5), 0.5])
