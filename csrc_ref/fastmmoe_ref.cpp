// The FastMMoE operations (arXiv 2511.17885) once more, as definitions: float64, scalar loops, one token at a time.
//
// Nothing here is tuned and nothing is shared with the kernels, so that the two can only agree by both being right.
// Arrays are dense and row-major; a mask is one byte per token, nonzero = true. Callers pass valid sizes
// (tests/oracle.py checks); `T` tokens, `E` experts, `K` experts per token, `H` hidden size, `I` expert intermediate
// size, `B` samples of `n` padded positions, `W` tokens per window.
//
// Values may be NaN or infinite. Where a definition chooses, NaN is the largest score; everywhere else it stays NaN.
// std::max(x, bound) keeps a NaN x, std::max(bound, x) would not.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

namespace {

enum Scoring : int32_t { SOFTMAX = 0, SIGMOID = 1 };
enum Strategy : int32_t { HYBRID = 0, ROUTING_SIMILARITY = 1, DYNAMIC_ATTENTION = 2 };
enum Activation : int32_t { SILU = 0, CLAMPED_SILU = 1, SILU_CLAMPED = 2, OAI = 3, GELU_TANH = 4, RELU2 = 5 };
enum MergeMethod : int32_t { MLERP = 0, MEAN = 1 };

constexpr double INF = std::numeric_limits<double>::infinity();

// ---------------------------------------------------------------------------------------------------------------------
// small vector algebra
// ---------------------------------------------------------------------------------------------------------------------

double dot(const double* x, const double* y, int64_t size) {
    double sum = 0.0;
    for (int64_t i = 0; i < size; ++i) sum += x[i] * y[i];
    return sum;
}

double norm(const double* x, int64_t size) { return std::sqrt(dot(x, x, size)); }

// cosine of the angle between x and y; a zero vector has no direction and resembles nothing: 0.
double cosine(const double* x, const double* y, int64_t size) {
    return dot(x, y, size) / std::max(norm(x, size) * norm(y, size), 1e-20);
}

// mean of the given rows of a [rows, size] matrix.
std::vector<double> mean_row(const double* matrix, const std::vector<int64_t>& rows, int64_t size) {
    std::vector<double> mean(size, 0.0);
    for (int64_t row : rows)
        for (int64_t i = 0; i < size; ++i) mean[i] += matrix[row * size + i];
    for (int64_t i = 0; i < size; ++i) mean[i] /= static_cast<double>(rows.size());
    return mean;
}

// ---------------------------------------------------------------------------------------------------------------------
// choosing the best
// ---------------------------------------------------------------------------------------------------------------------

struct Choice {
    std::vector<int64_t> taken;  // best first
    double margin;               // last score taken - best score left over; infinite when either does not exist
};

// NaN is above any number, and no NaN is above another.
bool above(double a, double b) { return std::isnan(a) ? !std::isnan(b) : a > b; }

// how far score a, the better one, is from b; nothing can be confused with NaN.
double gap_between(double a, double b) { return std::isnan(a) ? INF : a - b; }

// the `count` candidates with the largest score[candidate]; equal scores: the candidate listed first.
Choice take_largest(std::vector<int64_t> candidates, const std::vector<double>& score, int64_t count) {
    std::stable_sort(candidates.begin(), candidates.end(),
                     [&](int64_t a, int64_t b) { return above(score[a], score[b]); });
    const int64_t available = static_cast<int64_t>(candidates.size());
    double margin = INF;
    if (count > 0 && count < available)
        margin = gap_between(score[candidates[count - 1]], score[candidates[count]]);
    candidates.resize(std::min(count, available));
    return {candidates, margin};
}

std::vector<int64_t> first_integers(int64_t count) {
    std::vector<int64_t> integers(count);
    std::iota(integers.begin(), integers.end(), int64_t{0});
    return integers;
}

// ---------------------------------------------------------------------------------------------------------------------
// routing
// ---------------------------------------------------------------------------------------------------------------------

std::vector<double> gate_probabilities(const double* logits, int64_t E, int32_t scoring) {
    std::vector<double> p(E);
    if (scoring == SIGMOID) {
        for (int64_t e = 0; e < E; ++e) p[e] = 1.0 / (1.0 + std::exp(-logits[e]));
        return p;
    }
    const double largest = *std::max_element(logits, logits + E);
    double sum = 0.0;
    for (int64_t e = 0; e < E; ++e) sum += p[e] = std::exp(logits[e] - largest);
    for (int64_t e = 0; e < E; ++e) p[e] /= sum;
    return p;
}

// group g holds the E / n_group consecutive experts from g * E / n_group on; its score is the sum of its `group_best`
// best experts'. Equal groups: the lower one.
Choice choose_groups(const std::vector<double>& s, int64_t n_group, int64_t topk_group, int64_t group_best) {
    const int64_t size = static_cast<int64_t>(s.size()) / n_group;
    std::vector<double> group_score(n_group);
    for (int64_t g = 0; g < n_group; ++g) {
        std::vector<double> members(s.begin() + g * size, s.begin() + (g + 1) * size);
        std::sort(members.begin(), members.end(), above);
        group_score[g] = std::accumulate(members.begin(), members.begin() + group_best, 0.0);
    }
    return take_largest(first_integers(n_group), group_score, topk_group);
}

double sum_over(const std::vector<int64_t>& experts, const std::vector<double>& p) {
    double sum = 0.0;
    for (int64_t e : experts) sum += p[e];
    return sum;
}

}  // namespace

extern "C" {

// hidden [T, H], weight [E, H], bias [E] or null -> logits [T, E], the gate's scores of every expert times logit_scale.
void fastmmoe_ref_gate_logits(const double* hidden, const double* weight, const double* bias, double logit_scale,
                              int64_t T, int64_t H, int64_t E, double* logits) {
    for (int64_t t = 0; t < T; ++t)
        for (int64_t e = 0; e < E; ++e) {
            const double score = dot(hidden + t * H, weight + e * H, H) + (bias != nullptr ? bias[e] : 0.0);
            logits[t * E + e] = score * logit_scale;
        }
}

// logits [T, E]; vision_mask, padding_mask [T]; correction_bias [E] or null; group_best 1 to E / n_group.
// skip_below [2] or null: the least weights of text and of vision tokens, before the scaling factor; exempt_mask [T].
// vision_experts [E] or null: those that a vision token may choose; where they are too few, slots stay unused.
// A padding token activates no expert, a vision token vision_top_k, any other top_k. Of these, a token that is not
// exempt skips those whose weight is below its least one; what it keeps keeps its weight.
// -> ids [T, top_k] by falling selection score, weights [T, top_k], probs [T, E]; unused slots: id E, weight 0.
// -> per token, how far its choice is from another one: score_gap (chosen against rejected experts), group_gap (chosen
//    against rejected groups), order_gap (neighbours among the chosen), skip_gap (weights against the least one, as a
//    share of the larger of the two); infinite where there is nothing to confuse.
void fastmmoe_ref_topk_routing(const double* logits, const uint8_t* vision_mask, const uint8_t* padding_mask,
                               const double* skip_below, const uint8_t* exempt_mask, const uint8_t* vision_experts,
                               const double* correction_bias, int64_t T, int64_t E, int64_t top_k,
                               int64_t vision_top_k, int32_t scoring, int32_t norm_topk_prob, int64_t n_group,
                               int64_t topk_group, int64_t group_best, double routed_scaling_factor,
                               int32_t renormalize, int32_t* ids, double* weights, double* probs, double* score_gap,
                               double* group_gap, double* order_gap, double* skip_gap) {
    const bool has_bias = correction_bias != nullptr;
    for (int64_t t = 0; t < T; ++t) {
        const std::vector<double> p = gate_probabilities(logits + t * E, E, scoring);
        for (int64_t e = 0; e < E; ++e) probs[t * E + e] = p[e];
        for (int64_t k = 0; k < top_k; ++k) {
            ids[t * top_k + k] = static_cast<int32_t>(E);
            weights[t * top_k + k] = 0.0;
        }
        score_gap[t] = group_gap[t] = order_gap[t] = skip_gap[t] = INF;
        if (padding_mask[t]) continue;

        // selection score: the bias decides who is chosen, never with which weight.
        std::vector<double> s = p;
        if (has_bias)
            for (int64_t e = 0; e < E; ++e) s[e] += correction_bias[e];

        std::vector<int64_t> eligible = first_integers(E);
        if (n_group > 1) {
            const Choice groups = choose_groups(s, n_group, topk_group, group_best);
            group_gap[t] = groups.margin;
            std::vector<bool> chosen(n_group, false);
            for (int64_t g : groups.taken) chosen[g] = true;
            eligible.clear();
            for (int64_t e = 0; e < E; ++e)
                if (chosen[e / (E / n_group)]) eligible.push_back(e);
        }

        const Choice original = take_largest(eligible, s, top_k);  // what the pretrained model would have chosen
        const bool restricted = vision_mask[t] && vision_experts != nullptr;
        if (restricted) {
            std::vector<int64_t> allowed;
            for (int64_t e : eligible)
                if (vision_experts[e]) allowed.push_back(e);
            eligible = allowed;
        }
        const Choice selected = take_largest(eligible, s, vision_mask[t] ? vision_top_k : top_k);
        const int64_t active = static_cast<int64_t>(selected.taken.size());

        // what gives the weights the sum that they shall have, before the scaling factor.
        const bool rescale = !norm_topk_prob && renormalize && (active < top_k || restricted);
        const double sum = std::max(sum_over(selected.taken, p), 1e-20);  // probabilities that are all zero stay zero
        double scale = 1.0;
        if (norm_topk_prob) scale = 1.0 / sum;
        if (rescale) scale = sum_over(original.taken, p) / sum;

        for (int64_t k = 0; k < active; ++k) {
            const int64_t e = selected.taken[k];
            const double weight = p[e] * scale;
            if (skip_below != nullptr && !exempt_mask[t]) {
                const double least = skip_below[vision_mask[t] ? 1 : 0];
                const double gap = std::abs(weight - least) / std::max(std::abs(weight), std::abs(least));
                skip_gap[t] = std::min(skip_gap[t], gap);
                if (weight < least) continue;
            }
            ids[t * top_k + k] = static_cast<int32_t>(e);
            weights[t * top_k + k] = weight * routed_scaling_factor;
        }

        // a rescaled token also depends on who is in its original top-K.
        score_gap[t] = rescale ? std::min(selected.margin, original.margin) : selected.margin;
        for (int64_t k = 1; k < active; ++k)
            order_gap[t] = std::min(order_gap[t], gap_between(s[selected.taken[k - 1]], s[selected.taken[k]]));
    }
}

// ids [T, K] of experts that tokens chose (others than 0 to E - 1 are none), with weights [T, K]; vision_mask [T].
// -> chosen [E]: the `budget` experts with the largest demand, which is the sum of weight^8 over the vision tokens that
//    chose them; equal ones: the lower id. gap: the last one's demand over that of the best one that is not chosen.
void fastmmoe_ref_choose_experts(const int32_t* ids, const double* weights, const uint8_t* vision_mask, int64_t T,
                                 int64_t K, int64_t E, int64_t budget, uint8_t* chosen, double* gap) {
    std::vector<double> demand(E, 0.0);
    for (int64_t t = 0; t < T; ++t)
        for (int64_t k = 0; k < K; ++k)
            if (vision_mask[t] && ids[t * K + k] >= 0 && ids[t * K + k] < E)
                demand[ids[t * K + k]] += std::pow(weights[t * K + k], 8);
    const Choice best = take_largest(first_integers(E), demand, budget);
    std::fill(chosen, chosen + E, 0);
    for (int64_t e : best.taken) chosen[e] = 1;
    const double last = demand[best.taken.back()];
    *gap = std::isinf(best.margin) ? INF : best.margin / std::max(last, 1e-300);
}

}  // extern "C"

// ---------------------------------------------------------------------------------------------------------------------
// experts
// ---------------------------------------------------------------------------------------------------------------------

namespace {

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

double silu(double x) { return x * sigmoid(x); }

double gelu_tanh(double x) {
    const double pi = std::acos(-1.0);
    return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / pi) * (x + 0.044715 * x * x * x)));
}

double clamp(double x, double limit) { return std::max(std::min(x, limit), -limit); }

// what an expert makes of its gate and its up projection, in one of its I places; RELU2 has no gate.
double activate(double gate, double up, int32_t activation, double limit, double alpha) {
    switch (activation) {
        case CLAMPED_SILU: return silu(std::min(gate, limit)) * clamp(up, limit);
        case SILU_CLAMPED: return std::min(silu(gate), limit) * clamp(up, limit);
        case OAI: {
            const double g = std::min(gate, limit);
            return g * sigmoid(alpha * g) * (clamp(up, limit) + 1.0);
        }
        case GELU_TANH: return gelu_tanh(gate) * up;
        case RELU2: return std::max(up, 0.0) * std::max(up, 0.0);
        default: return silu(gate) * up;
    }
}

}  // namespace

extern "C" {

// hidden [T, H]; gate_up_proj [E, 2I, H], the I gate rows first, then the I up rows, or, where interleaved, gate and up
// rows in turn ([E, I, H], the up rows alone, where the activation has no gate); gate_up_bias, one per row, or null;
// down_proj [E, H, I]; down_bias [E, H] or null; ids, weights [T, K], a slot whose id is no expert is skipped.
// -> output [T, H] = sum over a token's slots of weight * down(activate(gate(x), up(x))).
void fastmmoe_ref_moe_experts(const double* hidden, const double* gate_up_proj, const double* gate_up_bias,
                              const double* down_proj, const double* down_bias, const int32_t* ids,
                              const double* weights, int64_t T, int64_t H, int64_t E, int64_t I, int64_t K,
                              int32_t activation, double limit, double alpha, int32_t interleaved, double* output) {
    const bool has_gate = activation != RELU2;
    const int64_t rows = has_gate ? 2 * I : I;
    std::vector<double> activated(I);
    for (int64_t t = 0; t < T; ++t) {
        const double* x = hidden + t * H;
        for (int64_t h = 0; h < H; ++h) output[t * H + h] = 0.0;
        for (int64_t k = 0; k < K; ++k) {
            const int64_t e = ids[t * K + k];
            if (e < 0 || e >= E) continue;
            const auto project = [&](int64_t row) {
                const double bias = gate_up_bias != nullptr ? gate_up_bias[e * rows + row] : 0.0;
                return dot(gate_up_proj + (e * rows + row) * H, x, H) + bias;
            };
            for (int64_t i = 0; i < I; ++i) {
                if (!has_gate) activated[i] = activate(0.0, project(i), activation, limit, alpha);
                else if (interleaved) activated[i] = activate(project(2 * i), project(2 * i + 1), activation, limit, alpha);
                else activated[i] = activate(project(i), project(I + i), activation, limit, alpha);
            }
            for (int64_t h = 0; h < H; ++h) {
                const double bias = down_bias != nullptr ? down_bias[e * H + h] : 0.0;
                const double y = dot(down_proj + (e * H + h) * I, activated.data(), I) + bias;
                output[t * H + h] += weights[t * K + k] * y;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// attention of the last query
// ---------------------------------------------------------------------------------------------------------------------

// query [B, Hq, D]; key [B, Hkv, n, D], query head h reads key head h / (Hq / Hkv); key_mask [B, Hm, n], query head h
// sees row h / (Hq / Hm); sinks [Hq], -INF where a head has none.
// -> probs [B, n]: softmax over the scores scale * q.k of the valid keys and the head's sink, mean over query heads; a
// head without a valid key gives 0.
void fastmmoe_ref_last_query_attention(const double* query, const double* key, const uint8_t* key_mask,
                                       const double* sinks, double scale, int64_t B, int64_t Hq, int64_t Hkv,
                                       int64_t Hm, int64_t n, int64_t D, double* probs) {
    std::vector<double> score(n);
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t j = 0; j < n; ++j) probs[b * n + j] = 0.0;
        for (int64_t h = 0; h < Hq; ++h) {
            const double* q = query + (b * Hq + h) * D;
            const double* keys = key + (b * Hkv + h / (Hq / Hkv)) * n * D;
            const uint8_t* valid = key_mask + (b * Hm + h / (Hq / Hm)) * n;
            double largest = sinks[h];
            for (int64_t j = 0; j < n; ++j) {
                score[j] = valid[j] ? scale * dot(q, keys + j * D, D) : -INF;
                largest = std::max(largest, score[j]);
            }
            // a score of -inf has no part in the sum and gets 0, also where the sum is NaN
            double sum = sinks[h] == -INF ? 0.0 : std::exp(sinks[h] - largest);
            for (int64_t j = 0; j < n; ++j)
                if (score[j] != -INF) sum += std::exp(score[j] - largest);
            for (int64_t j = 0; j < n; ++j)
                if (score[j] != -INF) probs[b * n + j] += std::exp(score[j] - largest) / sum / static_cast<double>(Hq);
        }
    }
}

}  // extern "C"

// ---------------------------------------------------------------------------------------------------------------------
// pruning: runs, windows, counts
// ---------------------------------------------------------------------------------------------------------------------

namespace {

using Positions = std::vector<int64_t>;  // positions in one sample's padded sequence, rising

// one sample's stretches of consecutive vision tokens. Padding holds no token: it is in no run and ends none.
std::vector<Positions> vision_runs(const uint8_t* vision_mask, const uint8_t* attention_mask, int64_t n) {
    std::vector<Positions> runs;
    bool after_vision = false;
    for (int64_t i = 0; i < n; ++i) {
        if (!attention_mask[i]) continue;
        if (vision_mask[i]) {
            if (!after_vision) runs.emplace_back();
            runs.back().push_back(i);
        }
        after_vision = vision_mask[i];
    }
    return runs;
}

// every run cut from its start into windows of W tokens; its last may be short, and none reaches into the next run.
std::vector<Positions> cut_windows(const std::vector<Positions>& runs, int64_t W) {
    std::vector<Positions> windows;
    for (const Positions& run : runs)
        for (size_t i = 0; i < run.size(); ++i) {
            if (i % W == 0) windows.emplace_back();
            windows.back().push_back(run[i]);
        }
    return windows;
}

std::vector<int64_t> lengths_of(const std::vector<Positions>& runs) {
    std::vector<int64_t> lengths;
    for (const Positions& run : runs) lengths.push_back(static_cast<int64_t>(run.size()));
    return lengths;
}

struct Plan {
    int64_t n_vis;   // vision tokens that enter
    int64_t target;  // vision tokens that survive, merged ones included
    int64_t merged;  // windows that become one token each
};

Plan plan_for(const std::vector<int64_t>& run_lengths, double keep_ratio, double merge_ratio, int64_t W) {
    int64_t n_vis = 0, windows = 0;
    for (int64_t length : run_lengths) {
        n_vis += length;
        windows += (length + W - 1) / W;
    }
    const int64_t target = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(n_vis) * keep_ratio));
    if (n_vis <= 1 || target >= n_vis) return {n_vis, n_vis, 0};
    const int64_t asked = static_cast<int64_t>(static_cast<double>(target) * merge_ratio);
    // a merge of a full window removes W - 1 tokens; more merges than this would leave fewer than `target` tokens.
    const int64_t affordable = (n_vis - target) / std::max<int64_t>(1, W - 1);
    return {n_vis, target, std::min({asked, windows - 1, affordable})};
}

// ---------------------------------------------------------------------------------------------------------------------
// pruning: what one sample loses
// ---------------------------------------------------------------------------------------------------------------------

struct Options {
    double keep_ratio, merge_ratio;
    int64_t W;
    double alpha;
    int32_t strategy;
};

struct Sample {
    int64_t n, E;
    const double* probs;            // [n, E]
    const double* importance;       // [n]
    const uint8_t* vision_mask;     // [n]
    const uint8_t* attention_mask;  // [n]
};

Sample sample_at(int64_t b, const double* probs, const double* importance, const uint8_t* vision_mask,
                 const uint8_t* attention_mask, int64_t n, int64_t E) {
    return {n, E, probs + b * n * E, importance + b * n, vision_mask + b * n, attention_mask + b * n};
}

struct Redundancy {
    std::vector<double> S, A, C;  // per window
};

Redundancy redundancy_of(const Sample& sample, const std::vector<Positions>& windows, double alpha, int32_t strategy) {
    const size_t count = windows.size();
    Redundancy r{std::vector<double>(count), std::vector<double>(count), std::vector<double>(count)};
    for (size_t j = 0; j < count; ++j) {
        const double size = static_cast<double>(windows[j].size());

        // S_j: mean cosine of the tokens' routing probabilities with their mean; one token alone resembles no other.
        const std::vector<double> mean = mean_row(sample.probs, windows[j], sample.E);
        if (windows[j].size() > 1)
            for (int64_t i : windows[j]) r.S[j] += cosine(sample.probs + i * sample.E, mean.data(), sample.E);
        r.S[j] /= size;

        // A_j: mean attention importance, relative to the sample's largest below.
        for (int64_t i : windows[j]) r.A[j] += sample.importance[i];
        r.A[j] /= size;
    }
    double largest = -INF;  // of the numbers: NaN is a matter of its own window
    for (double a : r.A) largest = std::max(largest, a);
    for (size_t j = 0; j < count; ++j) {
        r.A[j] /= largest + 1e-10;
        switch (strategy) {
            case HYBRID: r.C[j] = alpha * r.S[j] - (1.0 - alpha) * r.A[j]; break;
            case ROUTING_SIMILARITY: r.C[j] = r.S[j]; break;
            case DYNAMIC_ATTENTION: r.C[j] = -r.A[j]; break;
        }
    }
    return r;
}

struct Selection {
    bool pruned;
    std::vector<Positions> merged;  // windows that become one token each
    Positions kept;                 // vision tokens that stay as they are
    double window_margin, token_margin;
};

Selection select(const Sample& sample, const Options& options) {
    const std::vector<Positions> runs = vision_runs(sample.vision_mask, sample.attention_mask, sample.n);
    const std::vector<Positions> windows = cut_windows(runs, options.W);
    const Plan plan = plan_for(lengths_of(runs), options.keep_ratio, options.merge_ratio, options.W);
    if (plan.target == plan.n_vis) return {false, {}, {}, INF, INF};

    // merge the most redundant windows.
    const Redundancy redundancy = redundancy_of(sample, windows, options.alpha, options.strategy);
    const Choice merged =
        take_largest(first_integers(static_cast<int64_t>(windows.size())), redundancy.C, plan.merged);
    std::vector<bool> in_merged_window(windows.size(), false);
    for (int64_t j : merged.taken) in_merged_window[j] = true;

    // of the tokens in the other windows, keep the most important.
    std::vector<double> importance(sample.importance, sample.importance + sample.n);
    if (options.strategy == ROUTING_SIMILARITY)
        for (int64_t i = 0; i < sample.n; ++i) importance[i] = norm(sample.probs + i * sample.E, sample.E);
    Positions candidates;
    Selection selection{true, {}, {}, merged.margin, INF};
    for (size_t j = 0; j < windows.size(); ++j) {
        if (in_merged_window[j])
            selection.merged.push_back(windows[j]);
        else
            candidates.insert(candidates.end(), windows[j].begin(), windows[j].end());
    }
    const Choice kept = take_largest(candidates, importance, plan.target - plan.merged);
    selection.kept = kept.taken;
    selection.token_margin = kept.margin;
    return selection;
}

// one token out of the given rows of a [n, H] matrix.
std::vector<double> merge_rows(const double* matrix, const Positions& rows, int64_t H, int32_t merge_method) {
    std::vector<double> row = mean_row(matrix, rows, H);
    if (merge_method == MLERP) {
        // averaging shortens vectors that point apart: the mean's direction, the longest token's length.
        double longest = 0.0;
        for (int64_t i : rows) longest = std::max(longest, norm(matrix + i * H, H));
        const double length = std::max(norm(row.data(), H), 1e-10);
        for (int64_t h = 0; h < H; ++h) row[h] = row[h] / length * longest;
    }
    return row;
}

}  // namespace

extern "C" {

// run_lengths [runs] of one sample -> target, merged; without pruning target = number of vision tokens, merged = 0.
void fastmmoe_ref_prune_plan(const int64_t* run_lengths, int64_t runs, double keep_ratio, double merge_ratio, int64_t W,
                             int64_t* target, int64_t* merged) {
    const Plan plan = plan_for({run_lengths, run_lengths + runs}, keep_ratio, merge_ratio, W);
    *target = plan.target;
    *merged = plan.merged;
}

// vision_mask, attention_mask [B, n] -> number of windows in the batch.
int64_t fastmmoe_ref_count_windows(const uint8_t* vision_mask, const uint8_t* attention_mask, int64_t B, int64_t n,
                                   int64_t W) {
    int64_t count = 0;
    for (int64_t b = 0; b < B; ++b) {
        const std::vector<Positions> runs = vision_runs(vision_mask + b * n, attention_mask + b * n, n);
        count += static_cast<int64_t>(cut_windows(runs, W).size());
    }
    return count;
}

// probs [B, n, E]; importance, vision_mask, attention_mask [B, n].
// -> S, A, C [windows of the batch], in batch and sequence order.
void fastmmoe_ref_window_redundancy(const double* probs, const double* importance, const uint8_t* vision_mask,
                                    const uint8_t* attention_mask, int64_t B, int64_t n, int64_t E, int64_t W,
                                    double alpha, int32_t strategy, double* S, double* A, double* C) {
    for (int64_t b = 0; b < B; ++b) {
        const Sample sample = sample_at(b, probs, importance, vision_mask, attention_mask, n, E);
        const std::vector<Positions> windows =
            cut_windows(vision_runs(sample.vision_mask, sample.attention_mask, n), W);
        const Redundancy r = redundancy_of(sample, windows, alpha, strategy);
        S = std::copy(r.S.begin(), r.S.end(), S);
        A = std::copy(r.A.begin(), r.A.end(), A);
        C = std::copy(r.C.begin(), r.C.end(), C);
    }
}

// -> how far each sample's selection is from another one: window_margin [B] (merged against other windows, in C) and
//    token_margin [B] (kept against dropped tokens, in importance); infinite where there is nothing to confuse.
void fastmmoe_ref_selection_margin(const double* probs, const double* importance, const uint8_t* vision_mask,
                                   const uint8_t* attention_mask, int64_t B, int64_t n, int64_t E, double keep_ratio,
                                   double merge_ratio, int64_t W, double alpha, int32_t strategy, double* window_margin,
                                   double* token_margin) {
    const Options options{keep_ratio, merge_ratio, W, alpha, strategy};
    for (int64_t b = 0; b < B; ++b) {
        const Selection selection =
            select(sample_at(b, probs, importance, vision_mask, attention_mask, n, E), options);
        window_margin[b] = selection.window_margin;
        token_margin[b] = selection.token_margin;
    }
}

// -> n_out, the most tokens any sample has left. It follows from the masks alone.
int64_t fastmmoe_ref_pruned_length(const uint8_t* vision_mask, const uint8_t* attention_mask, int64_t B, int64_t n,
                                   double keep_ratio, double merge_ratio, int64_t W) {
    int64_t n_out = 0;
    for (int64_t b = 0; b < B; ++b) {
        const std::vector<Positions> runs = vision_runs(vision_mask + b * n, attention_mask + b * n, n);
        int64_t tokens = 0;
        for (int64_t i = 0; i < n; ++i) tokens += attention_mask[b * n + i] != 0;
        const Plan plan = plan_for(lengths_of(runs), keep_ratio, merge_ratio, W);
        n_out = std::max(n_out, tokens - plan.n_vis + plan.target);
    }
    return n_out;
}

// hidden, residual [B, n, H]; probs [B, n, E]; importance, vision_mask, attention_mask [B, n].
// -> out_hidden, out_residual [B, n_out, H], index [B, n_out] (position in the input; a merged token's is its window's
//    first), is_merged [B, n_out]; padding (on the left or the right) holds zeros and index -1.
void fastmmoe_ref_prune_tokens(const double* hidden, const double* residual, const double* probs,
                               const double* importance, const uint8_t* vision_mask, const uint8_t* attention_mask,
                               int64_t B, int64_t n, int64_t H, int64_t E, double keep_ratio, double merge_ratio,
                               int64_t W, double alpha, int32_t strategy, int32_t merge_method, int32_t pad_left,
                               int64_t n_out, double* out_hidden, double* out_residual, int64_t* index,
                               uint8_t* is_merged) {
    std::fill(out_hidden, out_hidden + B * n_out * H, 0.0);
    std::fill(out_residual, out_residual + B * n_out * H, 0.0);
    std::fill(index, index + B * n_out, int64_t{-1});
    std::fill(is_merged, is_merged + B * n_out, uint8_t{0});

    const Options options{keep_ratio, merge_ratio, W, alpha, strategy};
    for (int64_t b = 0; b < B; ++b) {
        const Sample sample = sample_at(b, probs, importance, vision_mask, attention_mask, n, E);
        const Selection selection = select(sample, options);

        // sources[i]: the input rows of the token that stands at position i afterwards; none if there is no such token.
        std::vector<Positions> sources(n);
        std::vector<bool> merged_here(n, false);
        for (int64_t i = 0; i < n; ++i)
            if (sample.attention_mask[i] && !(selection.pruned && sample.vision_mask[i])) sources[i] = {i};
        for (int64_t i : selection.kept) sources[i] = {i};
        for (const Positions& window : selection.merged) {
            sources[window[0]] = window;
            merged_here[window[0]] = true;
        }

        int64_t length = 0;
        for (const Positions& rows : sources) length += !rows.empty();
        int64_t out = b * n_out + (pad_left ? n_out - length : 0);
        for (int64_t i = 0; i < n; ++i) {
            if (sources[i].empty()) continue;
            std::vector<double> hidden_row(hidden + (b * n + i) * H, hidden + (b * n + i + 1) * H);
            std::vector<double> residual_row(residual + (b * n + i) * H, residual + (b * n + i + 1) * H);
            if (merged_here[i]) {
                hidden_row = merge_rows(hidden + b * n * H, sources[i], H, merge_method);
                residual_row = merge_rows(residual + b * n * H, sources[i], H, merge_method);
            }
            std::copy(hidden_row.begin(), hidden_row.end(), out_hidden + out * H);
            std::copy(residual_row.begin(), residual_row.end(), out_residual + out * H);
            index[out] = i;
            is_merged[out] = merged_here[i];
            ++out;
        }
    }
}

}  // extern "C"
