// The tape as Python builds and plays it. What comes from a caller at every step is checked here; a kernel may trust its arguments.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <string>

#include "bindings.hpp"
#include "cpu.hpp"
#include "tape.hpp"
#include "tape_ops.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace hasten {

namespace {

using Ints = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Longs = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<const std::uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = std::vector<float>;

[[noreturn]] void refuse(const std::string& what) { throw nb::value_error(what.c_str()); }

Isa isa_named(const std::string& name) {
    const Isa limit = name == "best" || name == "amx" ? Isa::amx
                      : name == "avx512"              ? Isa::avx512
                      : name == "avx2"                ? Isa::avx2
                      : name == "generic"             ? Isa::generic
                                                      : (refuse("isa is '" + name + "'; accepted: best, generic, avx2, avx512, amx"), Isa::generic);
    const Isa found = best_isa(limit);
    if (name != "best" && found != limit) refuse("isa '" + name + "' does not run on this machine");
    return found;
}

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::generic: return "generic";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::amx: return "amx";
    }
    return "?";
}

WeightFormat format_named(const std::string& name) {
    if (name == "bf16") return WeightFormat::bf16;
    if (name == "int8") return WeightFormat::int8;
    if (name == "int4") return WeightFormat::int4;
    refuse("weight format is '" + name + "'; accepted: bf16, int8, int4");
}

Activation activation_named(const std::string& name) {
    static const std::pair<const char*, Activation> known[] = {
        {"relu", Activation::relu},           {"relu_squared", Activation::relu_squared}, {"gelu", Activation::gelu},
        {"gelu_tanh", Activation::gelu_tanh}, {"silu", Activation::silu},                 {"sigmoid", Activation::sigmoid},
        {"tanh", Activation::tanh}};
    for (const auto& [its, activation] : known)
        if (name == its) return activation;
    refuse("activation is '" + name + "', which no kernel has");
}

// A tape with the sizes that bound what a caller may ask of it. Keeps what the tape reads alive.
struct Player {
    Tape tape;
    int vocab;
    int context;
    nb::list kept;

    Player(std::shared_ptr<ThreadPool> pool, const std::string& isa, std::size_t arena, int most_tokens, int vocab, int context)
        : tape(std::move(pool), isa_named(isa), arena, most_tokens), vocab(vocab), context(context) {}

    void run(Ints tokens, Ints positions, Ints offsets, Ints rows, std::vector<Longs> slots, std::vector<Table> tables, Logits logits) {
        StepInput step;
        step.tokens = static_cast<int>(tokens.size());
        step.sequences = static_cast<int>(offsets.size()) - 1;
        step.logit_rows = static_cast<int>(rows.size());
        check(step, tokens, positions, offsets, rows);
        if (logits.shape(0) != rows.size() || logits.shape(1) != static_cast<std::size_t>(vocab))
            refuse("logits must be [" + std::to_string(rows.size()) + ", " + std::to_string(vocab) + "]");
        const auto& groups = tape.groups();
        if (slots.size() != groups.size() || tables.size() != groups.size())
            refuse("one array of slots and one page table are needed per state group, of which there are " + std::to_string(groups.size()));
        step.token_ids = tokens.data();
        step.positions = positions.data();
        step.offsets = offsets.data();
        step.rows = rows.data();
        step.logits = logits.data();
        for (std::size_t group = 0; group < groups.size(); ++group) check_pages(step, *groups[group], slots[group], tables[group]);
        nb::gil_scoped_release unlocked;
        tape.run(step);
    }

   private:
    void check(const StepInput& step, const Ints& tokens, const Ints& positions, const Ints& offsets, const Ints& rows) const {
        if (step.tokens < 1 || step.tokens > tape.most_tokens())
            refuse(std::to_string(step.tokens) + " tokens in a step; accepted: 1 to " + std::to_string(tape.most_tokens()));
        if (positions.size() != tokens.size()) refuse("as many positions as tokens are needed");
        if (step.sequences < 1 || offsets(0) != 0 || offsets(step.sequences) != step.tokens) refuse("offsets must go from 0 to the number of tokens");
        if (step.logit_rows > tape.most_tokens()) refuse("at most as many logit rows as tokens can be asked for");
        for (int i = 0; i < step.sequences; ++i)
            if (offsets(i + 1) <= offsets(i)) refuse("sequence " + std::to_string(i) + " has no tokens");
        for (int i = 0; i < step.tokens; ++i) {
            if (tokens(i) < 0 || tokens(i) >= vocab)
                refuse("token id " + std::to_string(tokens(i)) + " is outside the vocabulary; accepted are 0 to " + std::to_string(vocab - 1));
            if (positions(i) < 0 || positions(i) >= context)
                refuse("position " + std::to_string(positions(i)) + " is beyond the context of " + std::to_string(context) + " tokens");
        }
        for (int s = 0; s < step.sequences; ++s)
            for (int i = offsets(s) + 1; i < offsets(s + 1); ++i)
                if (positions(i) != positions(i - 1) + 1) refuse("positions of sequence " + std::to_string(s) + " do not follow one another");
        for (int i = 0; i < step.logit_rows; ++i)
            if (rows(i) < 0 || rows(i) >= step.tokens) refuse("logit row " + std::to_string(rows(i)) + " is no row of this step");
    }

    static void check_pages(StepInput& step, const PagePool& pool, const Longs& slots, const Table& table) {
        const int width = static_cast<int>(table.shape(1)), page = pool.page();
        if (slots.size() != static_cast<std::size_t>(step.tokens)) refuse("as many slots as tokens are needed");
        if (table.shape(0) != static_cast<std::size_t>(step.sequences)) refuse("a page table needs one row per sequence");
        const std::int64_t places = std::int64_t{pool.pages()} * page;
        for (std::size_t i = 0; i < slots.size(); ++i)
            if (slots(i) < 0 || slots(i) >= places) refuse("slot " + std::to_string(slots(i)) + " is outside the cache");
        for (int s = 0; s < step.sequences; ++s) {
            const int pages = step.positions[step.offsets[s + 1] - 1] / page + 1;  // all of them: a window skips pages, it does not renumber them
            if (pages > width) refuse("the page table of sequence " + std::to_string(s) + " is too short for its positions");
            for (int i = 0; i < pages; ++i)
                if (table(s, i) < 0 || table(s, i) >= pool.pages()) refuse("page " + std::to_string(table(s, i)) + " is outside the cache");
        }
        step.slots.push_back(slots.data());
        step.tables.push_back(table.data());
        step.widths.push_back(width);
    }
};

Rows rows_named(bool logit_rows) { return logit_rows ? Rows::logits : Rows::tokens; }

Place place(std::int64_t offset) { return {offset < 0 ? Place::kLogits : static_cast<std::size_t>(offset)}; }

template <class Op, class... Args>
void add_op(Player& player, Args&&... args) {
    player.tape.add(std::make_unique<Op>(std::forward<Args>(args)...));
}

}  // namespace

void bind_executor(nb::module_& module) {
    module.def("isa_level", [](const std::string& isa) { return name_of(isa_named(isa)); }, "isa"_a = "best",
               "The instruction-set level that kernels run at: generic, avx2, avx512 or amx. Raises ValueError for one this machine lacks.");

    nb::class_<ThreadPool>(module, "ThreadPool", "Threads that play steps together, the caller's included; asleep between steps.")
        .def("__init__",
             [](ThreadPool* self, int threads) {
                 const int most = static_cast<int>(allowed_threads());
                 if (threads < 1 || threads > most) refuse("threads is " + std::to_string(threads) + "; accepted: 1 to " + std::to_string(most));
                 new (self) ThreadPool(static_cast<unsigned>(threads));
             },
             "threads"_a)
        .def_prop_ro("threads", &ThreadPool::size);

    nb::class_<WeightBuffer>(module, "WeightBuffer", "A linear layer's weight, packed for this machine's kernels.")
        .def("__init__",
             [](WeightBuffer* self, ThreadPool& pool, const std::string& format, int group, Halves dense) {
                 const WeightFormat its = format_named(format);
                 const std::size_t out = dense.shape(0), in = dense.shape(1);
                 if (out < 1 || in < 1 || out > std::numeric_limits<int>::max() / 2 || in > std::numeric_limits<int>::max() / 2)
                     refuse("a weight must have at least one row and one column");
                 nb::gil_scoped_release unlocked;
                 new (self) WeightBuffer(pool, its, static_cast<int>(out), static_cast<int>(in), group, dense.data());
             },
             "pool"_a, "format"_a, "group"_a, "dense"_a)
        .def_prop_ro("nbytes", &WeightBuffer::bytes)
        .def_prop_ro("padded_in", [](const WeightBuffer& self) { return self.packed().padded_in(); });

    nb::class_<PagePool>(module, "PagePool", "Keys and values of a state group, bf16, in pages.")
        .def(nb::init<int, int, int, int, int, int>(), "layers"_a, "pages"_a, "page"_a, "kv_heads"_a, "key_dim"_a, "value_dim"_a)
        .def_prop_ro("pages", &PagePool::pages)
        .def_prop_ro("page", &PagePool::page);

    nb::class_<Player>(module, "Tape", "A compiled Program. Places are byte offsets into its arena; -1 is the caller's logits.")
        .def(nb::init<std::shared_ptr<ThreadPool>, const std::string&, std::size_t, int, int, int>(), "pool"_a, "isa"_a, "arena_bytes"_a,
             "most_tokens"_a, "vocab"_a, "context"_a)
        .def_prop_ro("ops", [](const Player& self) { return self.tape.ops(); })
        .def("group", [](Player& self, std::shared_ptr<PagePool> pages) { return self.tape.add_group(std::move(pages)); }, "pages"_a)
        .def("embed",
             [](Player& self, Halves table, float scale, std::int64_t y) {
                 self.kept.append(table.cast());
                 add_op<EmbedOp>(self, table.data(), static_cast<int>(table.shape(1)), scale, place(y));
             },
             "table"_a, "scale"_a, "y"_a)
        .def("rotary_table",
             [](Player& self, Floats frequencies, float magnitude, std::int64_t cos, std::int64_t sin) {
                 add_op<RotaryTableOp>(self, std::move(frequencies), magnitude, place(cos), place(sin));
             },
             "frequencies"_a, "magnitude"_a, "cos"_a, "sin"_a)
        .def("rms_norm",
             [](Player& self, bool logit_rows, std::int64_t x, std::int64_t y, int n, int group, Floats weight, float eps, float offset) {
                 add_op<RmsNormOp>(self, rows_named(logit_rows), place(x), place(y), n, group, std::move(weight), eps, offset);
             },
             "logit_rows"_a, "x"_a, "y"_a, "n"_a, "group"_a, "weight"_a, "eps"_a, "offset"_a)
        .def("feed",
             [](Player& self, bool logit_rows, std::int64_t x, std::int64_t y, std::int64_t scales, int n, int padded, int stride,
                bool to_int8) {
                 if (padded < n || stride < padded) refuse("rows of " + std::to_string(stride) + " do not hold " + std::to_string(n) + " padded");
                 add_op<FeedOp>(self, rows_named(logit_rows), place(x), place(y), place(scales), n, padded, stride, to_int8);
             },
             "logit_rows"_a, "x"_a, "y"_a, "scales"_a, "n"_a, "padded"_a, "stride"_a,
             "to_int8"_a)
        .def("linear",
             [](Player& self, bool logit_rows, std::shared_ptr<WeightBuffer> weight, std::int64_t x, std::int64_t scales, std::int64_t y,
                int stride, Floats bias) {
                 if (stride < weight->packed().padded_in()) refuse("rows of " + std::to_string(stride) + " are shorter than the weight's");
                 add_op<LinearOp>(self, rows_named(logit_rows), std::move(weight), place(x), place(scales), place(y), stride, std::move(bias));
             },
             "logit_rows"_a, "weight"_a, "x"_a, "scales"_a, "y"_a, "stride"_a, "bias"_a)
        .def("rotate",
             [](Player& self, std::int64_t x, std::int64_t y, std::int64_t cos, std::int64_t sin, int heads, int head_dim, int start, int dims,
                bool interleaved) {
                 add_op<RotateOp>(self, place(x), place(y), place(cos), place(sin), heads, head_dim, start, dims, interleaved);
             },
             "x"_a, "y"_a, "cos"_a, "sin"_a, "heads"_a, "head_dim"_a, "start"_a, "dims"_a, "interleaved"_a)
        .def("append_kv",
             [](Player& self, int group, int slot, std::int64_t k, std::int64_t v) { add_op<AppendOp>(self, group, slot, place(k), place(v)); },
             "group"_a, "slot"_a, "k"_a, "v"_a)
        .def("attend",
             [](Player& self, int group, int slot, std::int64_t q, std::int64_t y, int heads, int kv_heads, int key_dim, int value_dim,
                float scale, int window, float softcap, Floats slopes, Floats sinks) {
                 const AttendShape shape{heads, kv_heads, key_dim, value_dim, scale, window, softcap, nullptr, nullptr};
                 self.tape.need_scratch(attend_scratch(shape, AttendOp::kQueryRows));
                 add_op<AttendOp>(self, group, slot, place(q), place(y), shape, std::move(slopes), std::move(sinks));
             },
             "group"_a, "slot"_a, "q"_a, "y"_a, "heads"_a, "kv_heads"_a, "key_dim"_a, "value_dim"_a, "scale"_a, "window"_a, "softcap"_a,
             "slopes"_a, "sinks"_a)
        .def("add", [](Player& self, std::int64_t a, std::int64_t b, std::int64_t y, int n) { add_op<AddOp>(self, place(a), place(b), place(y), n); },
             "a"_a, "b"_a, "y"_a, "n"_a)
        .def("gate",
             [](Player& self, const std::string& activation, std::int64_t gate, std::int64_t up, std::int64_t y, int n) {
                 add_op<GateOp>(self, activation_named(activation), place(gate), place(up), place(y), n);
             },
             "activation"_a, "gate"_a, "up"_a, "y"_a, "n"_a)
        .def("select_rows", [](Player& self, std::int64_t x, std::int64_t y, int n) { add_op<SelectRowsOp>(self, place(x), place(y), n); },
             "x"_a, "y"_a, "n"_a)
        .def("run", &Player::run, "tokens"_a, "positions"_a, "offsets"_a, "rows"_a, "slots"_a, "tables"_a, "logits"_a.noconvert(),
             "Play one step and fill ``logits`` [R, vocab]. Raises ValueError for ids, positions, rows or pages out of range.");
}

}  // namespace hasten
