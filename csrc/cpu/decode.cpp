// The inverse of one autoregressive block, all tokens and layers in one call; formulas, the solver
// and its promises in docs/decode.md.
//
// Threads form teams. A team owns some images, and its threads share the outputs of every product:
// each reads its own part of the weights, whatever the number of images. Work is never cut by sums,
// so that results depend on neither threads nor batch.

#include "barrier.h"
#include "decode_products.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace flowops::FLOWOPS_ISA {
namespace {

constexpr int64_t probe_sweeps = decode_probe_sweeps;

struct Row {
    int32_t cache;     // which keys and values: image, or B + image for its unconditional pass
    int32_t position;  // of the token
};

// One thread's view of the call.
template <class Weight>
class Decoder {
public:
    Decoder(const DecodeArgs &args, const DecodeTeams &teams, Barrier *barriers, int thread)
        : a(args),
          team(thread / teams.size),
          member(thread % teams.size),
          members(teams.size),
          all(teams.count * teams.size),
          barrier(barriers[1 + team]),
          everyone(barriers[0]),
          D(a.W / a.heads),
          padded_tokens(decode_padded(a.T)),
          padded_outputs(decode_padded(a.P)),
          rows_in_cache(a.guided ? 2 * a.B : a.B),
          first_image(a.B * team / teams.count),
          last_image(a.B * (team + 1) / teams.count) {
        float *room = static_cast<float *>(a.workspace);
        auto take = [&room](int64_t count) {
            float *taken = room;
            room += decode_padded(count);
            return taken;
        };
        const int64_t most = decode_rows(a), cache = a.L * rows_in_cache * a.W * padded_tokens;
        const int64_t first = first_image * (most / a.B);  // of the team's rows
        keys = take(cache);
        values = take(cache);
        h = take(most * a.W) + first * a.W;
        qkv = take(most * 3 * a.W) + first * 3 * a.W;
        attended = take(most * a.W) + first * a.W;
        shared_normed = take(most * a.W) + first * a.W;
        hidden = take(most * a.E) + first * a.E;
        params = take(most * padded_outputs) + first * padded_outputs;
        front = reinterpret_cast<int64_t *>(take(2 * a.B));
        room += thread * decode_thread_elements(a);
        own_normed = take(decode_own_rows * a.W);
        scores = take(padded_tokens);
        rows = reinterpret_cast<Row *>(take(2 * most));
    }

    void run(int64_t *sweeps) {
        int64_t window = a.window, wide = 0, single = 0, noted = 0, meetings = 0;
        for (int64_t i = first_image + member; i < last_image; i += members) start(i);
        barrier.wait(members);
        const bool deciding = a.break_even > 0 && window > 1;
        list_rows(window);
        while (count > 0) {
            if (deciding && meetings < 2 && wide == (meetings + 1) * probe_sweeps / 2) {
                const int64_t frozen = count_frozen();
                if (++meetings == 1)
                    noted = frozen;
                else if (!worthwhile(frozen, noted))
                    window = 1;
                list_rows(window);
            }
            sweep(window);
            (window == 1 ? single : wide) += 1;
            list_rows(window);
        }
        for (; deciding && meetings < 2; ++meetings) count_frozen();  // other teams wait for it
        if (member == 0) {
            sweeps[2 * team] = wide;
            sweeps[2 * team + 1] = single;
        }
    }

private:
    const DecodeArgs &a;
    const int team, member, members, all;
    Barrier &barrier, &everyone;
    const int64_t D, padded_tokens, padded_outputs, rows_in_cache, first_image, last_image;
    float *keys, *values, *h, *qkv, *attended, *shared_normed, *hidden, *params, *own_normed,
        *scores;
    int64_t *front;
    Row *rows;
    int64_t count = 0;  // of rows in this sweep

    int64_t share(int64_t n, int which) const { return n * (member + which) / members; }

    float *token(int64_t image, int64_t i) const {
        return a.x + (image * a.T + (a.reverse ? a.T - 1 - i : i)) * a.C;
    }

    int64_t tokens_ahead(int64_t image, int64_t window) const {
        const int64_t left = a.T - 1 - front[image];
        return left < window ? left : window;
    }

    void start(int64_t image) {
        __builtin_memcpy(a.x + image * a.T * a.C, a.z + image * a.T * a.C,
                         size_t(a.T * a.C) * sizeof(float));
        front[image] = 0;
        a.residual[image] = 0;
    }

    void list_rows(int64_t window) {
        count = 0;
        for (int64_t image = first_image; image < last_image; ++image)
            for (int64_t half = 0; half < (a.guided ? 2 : 1); ++half)
                for (int64_t t = 0; t < tokens_ahead(image, window); ++t)
                    rows[count++] = {int32_t(half * a.B + image), int32_t(front[image] + t)};
    }

    // Tokens that the sweeps so far have frozen, of all images of all teams.
    int64_t count_frozen() {
        everyone.wait(all);
        int64_t frozen = 0;
        for (int64_t image = 0; image < a.B; ++image) frozen += front[image];
        everyone.wait(all);
        return frozen;
    }

    // Whether sweeps freeze enough to go on with them, all of the probe or its second half: the
    // first ones freeze little, since a token takes a few to settle.
    bool worthwhile(int64_t frozen, int64_t noted) const {
        const double due = a.break_even * double(a.B);
        return double(frozen) >= due * double(probe_sweeps) ||
               double(frozen - noted) >= due * double(probe_sweeps / 2);
    }

    void sweep(int64_t window) {
        embed();
        barrier.wait(members);
        for (int64_t layer = 0; layer < a.L; ++layer) {
            attention(layer);
            perceptron(layer);
        }
        const int64_t outputs = padded_outputs / panel;
        linear(h, a.W, static_cast<const Weight *>(a.w_out), a.b_out, share(outputs, 0),
               share(outputs, 1), params, padded_outputs, false);
        barrier.wait(members);
        // Rows of an image: its tokens, then the same for its unconditional pass.
        for (int64_t row = 0, turn = 0; row < count; ++turn) {
            int64_t n = 1;
            while (row + n < count && rows[row + n].cache == rows[row].cache) ++n;
            if (turn % members == member) update(rows[row].cache, row, n, window == 1);
            row += a.guided ? 2 * n : n;
        }
        barrier.wait(members);
    }

    // h = W_in x + position + class of this thread's part of the rows.
    void embed() {
        for (int64_t m = share(count, 0); m < share(count, 1); ++m) {
            const Row row = rows[m];
            const int64_t image = row.cache < a.B ? row.cache : row.cache - a.B;
            float *to = h + m * a.W;
            const float *position = a.position + row.position * a.W;
            const float *label = a.embed + row.cache * a.W;
            for (int64_t i = 0; i < a.W; i += lanes)
                store_raw<lanes>(to + i,
                                 load_raw<lanes>(position + i) + load_raw<lanes>(label + i));
            product(1, a.W / panel, a.C, token(image, row.position), 0, a.w_in, a.C * panel, true,
                    to, 0);
        }
    }

    // out = bias (+ out) + in . w for all rows and the panels [first, last).
    void linear(const float *in, int64_t K, const Weight *w, const float *bias, int64_t first,
                int64_t last, float *out, int64_t out_stride, bool residual) const {
        for (int64_t m = 0; m < count; ++m)
            for (int64_t i = first * panel; i < last * panel; i += lanes) {
                float *to = out + m * out_stride + i;
                const Lane b = load_raw<lanes>(bias + i);
                store_raw<lanes>(to, residual ? load_raw<lanes>(to) + b : b);
            }
        product(count, last - first, K, in, K, w + first * K * panel, K * panel, true,
                out + first * panel, out_stride);
    }

    // Few rows: every thread makes all of them for itself, which saves a barrier.
    const float *normalise(const float *norm) {
        const bool own = count <= decode_own_rows;
        float *to = own ? own_normed : shared_normed;
        const int64_t first = own ? 0 : share(count, 0), last = own ? count : share(count, 1);
        for (int64_t m = first; m < last; ++m)
            layer_norm(h + m * a.W, norm, norm + a.W, a.W, a.eps, to + m * a.W);
        if (!own) barrier.wait(members);
        return to;
    }

    void attention(int64_t layer) {
        const int64_t W = a.W, panels = 3 * W / panel, head_panels = 3 * D / panel;
        const bool by_heads = a.heads % members == 0;
        const int64_t first = by_heads ? share(a.heads, 0) * head_panels : share(panels, 0);
        const int64_t last = by_heads ? share(a.heads, 1) * head_panels : share(panels, 1);
        const float *normed = normalise(a.norm1 + layer * 2 * W);
        linear(normed, W, static_cast<const Weight *>(a.qkv) + layer * 3 * W * W,
               a.qkv_bias + layer * 3 * W, first, last, qkv, 3 * W, false);
        for (int64_t i = first; i < last; ++i) cache_panel(layer, i);
        if (by_heads) {
            for (int64_t m = 0; m < count; ++m)
                for (int64_t head = share(a.heads, 0); head < share(a.heads, 1); ++head)
                    attend(layer, m, head);
        } else {
            barrier.wait(members);
            for (int64_t i = share(count * a.heads, 0); i < share(count * a.heads, 1); ++i)
                attend(layer, i / a.heads, i % a.heads);
        }
        barrier.wait(members);
        linear(attended, W, static_cast<const Weight *>(a.proj) + layer * W * W,
               a.proj_bias + layer * W, share(W / panel, 0), share(W / panel, 1), h, W, true);
        barrier.wait(members);
    }

    int64_t cached(int64_t layer, int64_t cache, int64_t head) const {
        return ((layer * rows_in_cache + cache) * a.heads + head) * padded_tokens * D;
    }

    // Outputs of qkv are packed by heads: q, k and v of the first, then those of the second. Keys
    // are cached as [tokens][D], values as [D / 16][tokens][16].
    void cache_panel(int64_t layer, int64_t i) const {
        const int64_t head = i * panel / (3 * D), inside = i * panel % (3 * D);
        if (inside < D) return;
        const bool is_key = inside < 2 * D;
        const int64_t step = is_key ? D : panel;
        const int64_t start = is_key ? inside - D : (inside - 2 * D) * padded_tokens;
        for (int64_t m = 0; m < count; ++m) {
            float *to = (is_key ? keys : values) + cached(layer, rows[m].cache, head) + start;
            __builtin_memcpy(to + rows[m].position * step, qkv + m * 3 * a.W + i * panel,
                             sizeof(float) * panel);
        }
    }

    // A token attends to all up to itself, and reads none beyond: what a window holds there may
    // be infinite.
    void attend(int64_t layer, int64_t m, int64_t head) const {
        const int64_t n = rows[m].position + 1, start = cached(layer, rows[m].cache, head);
        const float *q = qkv + m * 3 * a.W + head * 3 * D;
        dot_rows(q, keys + start, D, n, scores);
        const float scale = rows[m].cache < a.B ? a.scale : a.scale / a.temperature;
        Lane largest = Lane{} - __builtin_inff();
        for_lanes(n, [&](int64_t j, vec<int32_t, lanes> seen) {
            Lane s = load_raw<lanes>(scores + j) * scale;
            s = seen ? s : Lane{} - __builtin_inff();
            store_raw<lanes>(scores + j, s);
            largest = s > largest ? s : largest;
        });
        float most = largest[0];
        for (int i = 1; i < lanes; ++i) most = largest[i] > most ? largest[i] : most;
        Lane sum{};
        for_lanes(n, [&](int64_t j, vec<int32_t, lanes> seen) {
            const Lane e = decay(load_raw<lanes>(scores + j) - most);
            const Lane p = seen ? e : Lane{};
            store_raw<lanes>(scores + j, p);
            sum += p;
        });
        float total = 0;
        for (int i = 0; i < lanes; ++i) total += sum[i];
        float *out = attended + m * a.W + head * D;
        product(1, D / panel, n, scores, 0, values + start, padded_tokens * panel, false, out, 0);
        for (int64_t d = 0; d < D; d += lanes)
            store_raw<lanes>(out + d, load_raw<lanes>(out + d) / total);
    }

    // body(j, which of the lanes are below n) over [0, n) rounded up to whole registers.
    template <class Body>
    static void for_lanes(int64_t n, Body body) {
        vec<int32_t, lanes> lane;
        for (int i = 0; i < lanes; ++i) lane[i] = i;
        for (int64_t j = 0; j < n; j += lanes) body(j, lane < int32_t(n - j));
    }

    void perceptron(int64_t layer) {
        const int64_t W = a.W, E = a.E, first = share(E / panel, 0), last = share(E / panel, 1);
        const float *normed = normalise(a.norm2 + layer * 2 * W);
        linear(normed, W, static_cast<const Weight *>(a.up) + layer * E * W, a.up_bias + layer * E,
               first, last, hidden, E, false);
        for (int64_t m = 0; m < count; ++m)
            for (int64_t i = first * panel; i < last * panel; i += lanes) {
                float *to = hidden + m * E + i;
                store_raw<lanes>(to, gelu(load_raw<lanes>(to)));
            }
        barrier.wait(members);
        linear(hidden, E, static_cast<const Weight *>(a.down) + layer * W * E,
               a.down_bias + layer * W, share(W / panel, 0), share(W / panel, 1), h, W, true);
        barrier.wait(members);
    }

    // x_{i+1} = z_{i+1} exp(a_i) + b_i for the n tokens from the front on. A token is frozen while
    // it changes by at most tol: it stays as it is, which is what its keys and values and all later
    // tokens were computed from, so that the change is its residual. The first that changes by more
    // takes the new value, exact for what is frozen before it.
    void update(int64_t image, int64_t row, int64_t n, bool exact) const {
        const int64_t start = front[image];
        bool freezing = !exact;
        for (int64_t t = 0; t < n; ++t) {
            const int64_t i = start + t;
            float *p = params + (row + t) * padded_outputs, *x = token(image, i + 1);
            const float *free = a.guided ? p + n * padded_outputs : nullptr;
            const float *z = a.z + (x - a.x);
            const float change = transform(p, free, a.guide + 2 * i, z, x);
            if (freezing && change <= a.tol) {
                front[image] = i + 1;
                if (change > a.residual[image]) a.residual[image] = change;
                continue;
            }
            if (freezing || exact) front[image] = i + 1;
            freezing = false;
            __builtin_memcpy(x, p, size_t(a.C) * sizeof(float));
        }
    }

    // Puts the new token where its parameters p were; returns its largest change, NaN if any is.
    float transform(float *p, const float *free, const float *guide, const float *z,
                    const float *x) const {
        const int64_t C = a.C, shift = a.has_scale ? C : 0;
        float largest = 0;
        for_spans<float>(C, [&](int64_t c, auto length) {
            constexpr int N = decltype(length)::value;
            using Io = Convert<float, N>;
            auto b = Io::load(p + shift + c);
            if (free) b += guide[1] * (b - Io::load(free + shift + c));
            auto value = Io::load(z + c);
            if (a.has_scale) {
                auto s = Io::load(p + c);
                if (free) s += guide[0] * (s - Io::load(free + c));
                value = value * exponential<N>(s) + b;
            } else {
                value = value + b;
            }
            const auto difference = value - Io::load(x + c);
            Io::store(p + c, value);
            for (int i = 0; i < N; ++i) {
                const float d = difference[i] < 0 ? -difference[i] : difference[i];
                if (!(d <= largest) && largest == largest) largest = d;  // a NaN is taken and stays
            }
        });
        return largest;
    }
};

template <class Weight>
void run(const DecodeArgs &args) {
    const int threads = args.threads < 1 ? 1 : args.threads;
    Barrier *barriers = new Barrier[threads + 1];
    int64_t *sweeps = new int64_t[2 * threads]();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int thread = 0, started = 1;  // which may be fewer than asked for
#ifdef _OPENMP
        thread = omp_get_thread_num(), started = omp_get_num_threads();
#endif
        const DecodeTeams teams = decode_teams(args, started);
        if (thread < teams.count * teams.size)
            Decoder<Weight>(args, teams, barriers, thread).run(sweeps);
    }
    args.counts[0] = args.counts[1] = 0;
    for (int64_t i = 0; i < 2 * threads; ++i)
        if (sweeps[i] > args.counts[i % 2]) args.counts[i % 2] = sweeps[i];
    delete[] sweeps;
    delete[] barriers;
}

}  // namespace

void decode(const DecodeArgs &args) {
    args.dtype == DType::bf16 ? run<bf16>(args) : run<float>(args);
}

}  // namespace flowops::FLOWOPS_ISA
