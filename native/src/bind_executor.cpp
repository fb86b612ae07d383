// The tape as Python builds and plays it. What comes from a caller at every step is checked here; a kernel may trust its arguments.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>

#include "bind_arguments.hpp"
#include "bindings.hpp"
#include "borrowed.hpp"
#include "cpu.hpp"
#include "tape.hpp"
#include "tape_experts.hpp"
#include "tape_fused.hpp"
#include "tape_heads.hpp"
#include "tape_ops.hpp"
#include "tape_rows.hpp"
#include "tape_scans.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace hasten {

namespace {

using Halves = nb::ndarray<const std::uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using HalvesOfExperts = nb::ndarray<const std::uint16_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using OpTimes = nb::ndarray<std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatTable = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = std::vector<float>;

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A page's memory, which is as long as `bytes`.
template <class Array>
std::uint8_t* page_of(const Pages& pool, int page, const Array& bytes) {
    if (page < 0 || page >= pool.pages()) refuse("page " + std::to_string(page) + " is outside the cache");
    if (bytes.size() != pool.page_bytes()) refuse("a page has " + std::to_string(pool.page_bytes()) + " bytes, not " + std::to_string(bytes.size()));
    return pool.page_memory(page);
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

// The arrays of a step.
struct Arrays {
    BorrowedArray tokens, positions, offsets, rows, logits;

    Arrays(nb::handle tokens, nb::handle positions, nb::handle offsets, nb::handle rows, nb::handle logits)
        : tokens("tokens", tokens, 'i', 1), positions("positions", positions, 'i', 1), offsets("offsets", offsets, 'i', 1),
          rows("rows", rows, 'i', 1), logits("logits", logits, 'f', 2, true) {}
};

// A tape with the sizes that bound what a caller may ask of it. Keeps what the tape reads alive.
class Player {
   public:
    Tape tape;
    nb::list kept;

    Player(std::shared_ptr<ThreadPool> pool, const std::string& isa, std::size_t arena, int most_tokens, int vocab, int context)
        : tape(std::move(pool), isa_of(isa), arena, most_tokens), vocab_(vocab), context_(context) {}

    int context() const { return context_; }

    // The op goes into the chain or the products that are open, else on the tape.
    template <class Op>
    void add(std::unique_ptr<Op> op) {
        if constexpr (std::is_base_of_v<RowOp, Op>)
            if (chain_) {
                chain_->rows = op->rows();
                return chain_->parts.push_back(std::move(op));
            }
        if constexpr (std::is_same_v<Op, LinearOp>) {
            if (products_) return products_->push_back(std::move(op));
            open_products();
            products_->push_back(std::move(op));
            close();
        } else {
            if (chain_ || products_) refuse("an op that cannot be joined came between open and close");
            tape.add(std::move(op));
        }
    }
    void open_chain(int most, std::size_t bytes) {
        if (chain_ || products_) refuse("close comes before another open");
        if (most < 1) refuse("a block needs at least one row");
        tape.need_scratch((bytes + sizeof(float) - 1) / sizeof(float));
        chain_ = Chain{most, Rows::tokens, {}};
    }
    void open_products() {
        if (chain_ || products_) refuse("close comes before another open");
        products_.emplace();
    }
    void close() {
        if (chain_) tape.add(std::make_unique<ChainOp>(chain_->rows, chain_->most, std::move(chain_->parts)));
        if (products_) tape.add(std::make_unique<ProductsOp>(std::move(*products_), tape.threads()));
        chain_.reset();
        products_.reset();
    }

    // Plays a batch of any length, in several steps where it is longer than one takes. Nothing is played unless all of it is sound.
    std::size_t run(nb::handle tokens, nb::handle positions, nb::handle offsets, nb::handle rows, const std::vector<const PageTable*>& tables,
                    nb::handle logits) {
        const Arrays arrays(tokens, positions, offsets, rows, logits);
        const Batch batch = batch_of(arrays, tables);
        nb::gil_scoped_release unlocked;
        const std::lock_guard one_at_a_time(playing_);
        check(batch);
        std::size_t barriers = 0;
        by_steps(batch, [&] { barriers += tape.run(step_); });
        return barriers;
    }

    // Plays a batch as run does. Adds to op_ns [ops, threads], and returns (nanoseconds of the whole, nanoseconds of clocks).
    std::pair<std::int64_t, std::int64_t> profile(nb::handle tokens, nb::handle positions, nb::handle offsets, nb::handle rows,
                                                  const std::vector<const PageTable*>& tables, nb::handle logits, OpTimes op_ns) {
        if (op_ns.shape(0) != tape.ops() || op_ns.shape(1) != tape.threads())
            refuse("op_ns must be [" + std::to_string(tape.ops()) + ", " + std::to_string(tape.threads()) + "]");
        const Arrays arrays(tokens, positions, offsets, rows, logits);
        const Batch batch = batch_of(arrays, tables);
        std::int64_t* const times = op_ns.data();
        std::int64_t wall_ns = 0, clock_ns = 0;
        nb::gil_scoped_release unlocked;
        const std::lock_guard one_at_a_time(playing_);
        check(batch);
        by_steps(batch, [&] {
            const StepProfile each = tape.profile(step_, times);
            wall_ns += each.wall_ns;
            clock_ns += each.clock_ns;
        });
        return {wall_ns, clock_ns};
    }

   private:
    struct Chain {
        int most;
        Rows rows;
        std::vector<std::unique_ptr<RowOp>> parts;
    };
    // What a caller asks for: StepInput, of any length.
    struct Batch {
        int tokens, sequences, logit_rows;
        const std::int32_t* token_ids;
        const std::int32_t* positions;
        const std::int32_t* offsets;
        const std::int32_t* rows;
        const PageTable* const* tables;
        float* logits;
    };

    int vocab_;
    int context_;
    std::optional<Chain> chain_;
    std::optional<std::vector<std::unique_ptr<LinearOp>>> products_;
    std::mutex playing_;  // callers on other threads wait for their turn
    // Of the step being played; kept, so that a step allocates nothing.
    StepInput step_;
    std::vector<std::int32_t> offsets_, rows_;
    std::vector<std::vector<std::int64_t>> slots_;

    Batch batch_of(const Arrays& given, const std::vector<const PageTable*>& tables) const {
        if (given.logits.extent(0) != given.rows.extent(0) || given.logits.extent(1) != static_cast<std::size_t>(vocab_))
            refuse("logits must be [" + std::to_string(given.rows.extent(0)) + ", " + std::to_string(vocab_) + "]");
        if (given.positions.extent(0) != given.tokens.extent(0)) refuse("as many positions as tokens are needed");
        if (tables.size() + 1 != given.offsets.extent(0) || std::count(tables.begin(), tables.end(), nullptr))
            refuse("one page table per sequence is needed");
        return {static_cast<int>(given.tokens.extent(0)), static_cast<int>(tables.size()), static_cast<int>(given.rows.extent(0)),
                given.tokens.data<std::int32_t>(), given.positions.data<std::int32_t>(), given.offsets.data<std::int32_t>(),
                given.rows.data<std::int32_t>(), tables.data(), given.logits.data<float>()};
    }

    void check(const Batch& batch) const {
        if (batch.tokens < 1) refuse("a batch needs at least one token");
        if (batch.sequences < 1 || batch.offsets[0] != 0 || batch.offsets[batch.sequences] != batch.tokens)
            refuse("offsets must go from 0 to the number of tokens");
        for (int s = 0; s < batch.sequences; ++s)
            if (batch.offsets[s + 1] <= batch.offsets[s]) refuse("sequence " + std::to_string(s) + " has no tokens");
        for (int i = 0; i < batch.tokens; ++i) {
            const int token = batch.token_ids[i], position = batch.positions[i];
            if (token < 0 || token >= vocab_)
                refuse("token id " + std::to_string(token) + " is outside the vocabulary; accepted are 0 to " + std::to_string(vocab_ - 1));
            if (position < 0 || position >= context_)
                refuse("position " + std::to_string(position) + " is beyond the context of " + std::to_string(context_) +
                       " tokens; shorten the input");
        }
        for (int s = 0; s < batch.sequences; ++s) {
            for (int i = batch.offsets[s] + 1; i < batch.offsets[s + 1]; ++i)
                if (batch.positions[i] != batch.positions[i - 1] + 1)
                    refuse("positions of sequence " + std::to_string(s) + " do not follow one another");
            check_pages(s, batch.positions[batch.offsets[s + 1] - 1], *batch.tables[s]);
        }
        for (int i = 0; i < batch.logit_rows; ++i) {
            if (batch.rows[i] < 0 || batch.rows[i] >= batch.tokens) refuse("logit row " + std::to_string(batch.rows[i]) + " is no row of this batch");
            if (i && batch.rows[i] <= batch.rows[i - 1]) refuse("logit rows must rise");
        }
    }

    void check_pages(int sequence, int last, const PageTable& table) const {
        const auto& groups = tape.groups();
        if (table.pages.size() != groups.size()) refuse("a page table needs a list per state group, of which there are " + std::to_string(groups.size()));
        for (std::size_t group = 0; group < groups.size(); ++group) {
            const auto& pages = table.pages[group];
            std::size_t needed = 1;
            int most = 0;
            if (const auto* paged = std::get_if<std::shared_ptr<PagePool>>(&groups[group])) {
                needed = last / (*paged)->page() + 1;  // all of them: a window skips pages, it does not renumber them
                most = (*paged)->pages();
            } else {
                most = std::get<std::shared_ptr<StatePool>>(groups[group])->pages();
            }
            if (needed > pages.size()) refuse("the page table of sequence " + std::to_string(sequence) + " is too short for its positions");
            for (std::size_t i = 0; i < needed; ++i)
                if (pages[i] < 0 || pages[i] >= most) refuse("page " + std::to_string(pages[i]) + " is outside the cache");
        }
    }

    template <class Play>
    void by_steps(const Batch& batch, Play play) {
        for (int begin = 0; begin < batch.tokens; begin += tape.most_tokens()) {
            prepare(batch, begin, std::min(begin + tape.most_tokens(), batch.tokens));
            play();
        }
    }

    // step_ is the rows [begin, end) of the batch.
    void prepare(const Batch& batch, int begin, int end) {
        const int first = static_cast<int>(std::upper_bound(batch.offsets, batch.offsets + batch.sequences, begin) - batch.offsets) - 1;
        offsets_.clear();
        step_.tables.clear();
        for (int s = first; s < batch.sequences && batch.offsets[s] < end; ++s) {
            offsets_.push_back(std::max(batch.offsets[s], begin) - begin);
            step_.tables.push_back(batch.tables[s]);
        }
        step_.sequences = static_cast<int>(offsets_.size());
        offsets_.push_back(end - begin);
        step_.tokens = end - begin;
        step_.token_ids = batch.token_ids + begin;
        step_.positions = batch.positions + begin;
        step_.offsets = offsets_.data();
        fill_slots();
        const std::int32_t* const wanted = std::lower_bound(batch.rows, batch.rows + batch.logit_rows, begin);
        rows_.clear();
        for (const std::int32_t* row = wanted; row < batch.rows + batch.logit_rows && *row < end; ++row) rows_.push_back(*row - begin);
        step_.rows = rows_.data();
        step_.logit_rows = static_cast<int>(rows_.size());
        step_.logits = batch.logits + (wanted - batch.rows) * vocab_;
    }

    void fill_slots() {
        const auto& groups = tape.groups();
        slots_.resize(groups.size());
        step_.slots.resize(groups.size());
        for (std::size_t group = 0; group < groups.size(); ++group) {
            const auto* paged = std::get_if<std::shared_ptr<PagePool>>(&groups[group]);
            step_.slots[group] = nullptr;
            if (!paged) continue;
            const int page = (*paged)->page();
            slots_[group].resize(static_cast<std::size_t>(step_.tokens));
            for (int s = 0; s < step_.sequences; ++s) {
                const auto& pages = step_.tables[s]->pages[group];
                for (int i = step_.offsets[s]; i < step_.offsets[s + 1]; ++i) {
                    const int position = step_.positions[i];
                    slots_[group][i] = std::int64_t{pages[position / page]} * page + position % page;
                }
            }
            step_.slots[group] = slots_[group].data();
        }
    }
};

Rows rows_named(bool logit_rows) { return logit_rows ? Rows::logits : Rows::tokens; }

Place place(std::int64_t offset) {
    if (offset == -1) return {Place::kLogits};
    return {offset < 0 ? Place::kBlock | static_cast<std::size_t>(-2 - offset) : static_cast<std::size_t>(offset)};
}

template <class Op, class... Args>
void add_op(Player& player, Args&&... args) {
    player.add(std::make_unique<Op>(std::forward<Args>(args)...));
}

// What tape_rows.hpp's NumberOp does with `kernel`.
template <NumberOp::Kernel kernel>
void number_op(Player& player, bool logit_rows, std::int64_t x, std::int64_t y, int n, float number) {
    add_op<NumberOp>(player, rows_named(logit_rows), kernel, place(x), place(y), n, number);
}

// The recurrent states that are the tape's group of that number.
std::shared_ptr<StatePool> states_of(const Tape& tape, int group) {
    const auto& groups = tape.groups();
    if (group >= 0 && static_cast<std::size_t>(group) < groups.size())
        if (const auto* states = std::get_if<std::shared_ptr<StatePool>>(&groups[static_cast<std::size_t>(group)])) return *states;
    refuse("group " + std::to_string(group) + " keeps no recurrent state");
}

using Numbers = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

std::vector<float> copied(const Numbers& numbers) { return {numbers.data(), numbers.data() + numbers.size()}; }

// x, y, size, x_head, x_at, y_head, y_at of CopyFeaturesOp::Part.
using CopiedPart = std::tuple<std::int64_t, std::int64_t, int, int, int, int, int>;

}  // namespace

void bind_executor(nb::module_& module) {
    module.def("isa_level", [](const std::string& isa) { return name_of(isa_of(isa)); }, "isa"_a = "best",
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

    nb::class_<ExpertWeights>(module, "ExpertWeights", "The weights of a layer's experts, packed alike.")
        .def("__init__",
             [](ExpertWeights* self, std::vector<std::shared_ptr<WeightBuffer>> experts) {
                 if (experts.empty()) refuse("at least one expert is needed");
                 const PackedLinear& first = experts.front()->packed();
                 for (const auto& each : experts) {
                     const PackedLinear& its = each->packed();
                     if (its.format != first.format || its.out != first.out || its.in != first.in || its.group != first.group)
                         refuse("experts of one layer are packed alike");
                 }
                 new (self) ExpertWeights(std::move(experts));
             },
             "experts"_a)
        .def_prop_ro("nbytes", &ExpertWeights::bytes);

    nb::class_<Pages>(module, "Pages", "What sequences keep of one state group, page by page, each a run of bytes.")
        .def_prop_ro("pages", &Pages::pages)
        .def_prop_ro("page_bytes", &Pages::page_bytes)
        .def("copy_page",
             [](Pages& self, int from, int to) {
                 if (from < 0 || to < 0 || from >= self.pages() || to >= self.pages())
                     refuse("page " + std::to_string(from < 0 || from >= self.pages() ? from : to) + " is outside the cache");
                 self.copy_page(from, to);
             },
             "from_"_a, "to"_a, "Copy what every layer has in one page over another's. Raises ValueError for a page out of range.")
        .def("read_page", [](const Pages& self, int page, Bytes into) { std::memcpy(into.data(), page_of(self, page, into), into.size()); },
             "page"_a, "into"_a.noconvert(), "Copy all of a page to ``into``. Raises ValueError for a page out of range or another size.")
        .def("write_page", [](Pages& self, int page, ConstBytes from) { std::memcpy(page_of(self, page, from), from.data(), from.size()); },
             "page"_a, "from_"_a, "Copy what read_page gave over a page. Raises ValueError for a page out of range or another size.");

    nb::class_<StatePool, Pages>(module, "StatePool", "Recurrent states: a page is all that one sequence keeps, ``size`` float32 numbers a layer.")
        .def("__init__",
             [](StatePool* self, int layers, int pages, std::size_t size) {
                 if (layers < 1 || pages < 1) refuse("a pool of states has at least one of everything");
                 new (self) StatePool(layers, pages, size);
             },
             "layers"_a, "pages"_a, "size"_a);

    nb::class_<PagePool, Pages>(module, "PagePool", "Keys and values of a state group, bf16, int8 or fp8, in pages. value_dim 0: latent rows, in bf16.")
        .def("__init__",
             [](PagePool* self, const std::string& format, int layers, int pages, int page, int kv_heads, int key_dim, int value_dim) {
                 if (layers < 1 || pages < 1 || page < 1 || kv_heads < 1 || key_dim < 1 || value_dim < 0)
                     refuse("a page pool has at least one of everything");
                 const CacheFormat its = cache_format_named(format);
                 if (value_dim == 0 && its != CacheFormat::bf16) refuse("latent rows are kept in bf16");
                 new (self) PagePool(its, layers, pages, page, kv_heads, key_dim, value_dim);
             },
             "format"_a, "layers"_a, "pages"_a, "page"_a, "kv_heads"_a, "key_dim"_a, "value_dim"_a)
        .def_prop_ro("page", &PagePool::page);

    nb::class_<PageTable>(module, "PageTable", "The pages that hold one sequence, per state group in the order of its positions; of recurrent state the one.")
        .def("__init__", [](PageTable* self, std::vector<std::vector<std::int32_t>> pages) { new (self) PageTable{std::move(pages)}; },
             "pages"_a)
        .def("pages", [](const PageTable& self, std::size_t group) { return self.pages.at(group); }, "group"_a);

    nb::class_<Player>(module, "Tape", "A compiled Program. Places are byte offsets into its arena, -1 is the caller's logits, and -2 - n is\n"
                                       "byte n of a thread's own block, inside a chain.")
        .def(nb::init<std::shared_ptr<ThreadPool>, const std::string&, std::size_t, int, int, int>(), "pool"_a, "isa"_a, "arena_bytes"_a,
             "most_tokens"_a, "vocab"_a, "context"_a)
        .def_prop_ro("ops", [](const Player& self) { return self.tape.ops(); })
        .def_prop_ro("threads", [](const Player& self) { return self.tape.threads(); })
        .def_prop_ro("op_names", [](const Player& self) { return self.tape.op_names(); })
        .def("group", [](Player& self, std::shared_ptr<PagePool> pages) { return self.tape.add_group(std::move(pages)); }, "pages"_a)
        .def("group", [](Player& self, std::shared_ptr<StatePool> pages) { return self.tape.add_group(std::move(pages)); }, "pages"_a)
        .def("embed",
             [](Player& self, Halves table, float scale, std::int64_t y) {
                 self.kept.append(table.cast());
                 add_op<EmbedOp>(self, table.data(), static_cast<int>(table.shape(1)), scale, place(y));
             },
             "table"_a, "scale"_a, "y"_a)
        .def("embed",
             [](Player& self, std::shared_ptr<TableBuffer> table, float scale, std::int64_t y) {
                 add_op<EmbedOp>(self, std::move(table), scale, place(y));
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
             [](Player& self, bool logit_rows, std::int64_t x, std::int64_t y, std::optional<std::int64_t> scales, int runs, int n, int padded,
                int stride) {
                 if (padded < n || stride < padded) refuse("rows of " + std::to_string(stride) + " do not hold " + std::to_string(n) + " padded");
                 add_op<FeedOp>(self, rows_named(logit_rows), place(x), place(y), place(scales.value_or(0)), runs, n, padded, stride,
                                scales ? Feed::int8 : Feed::bf16);
             },
             "logit_rows"_a, "x"_a, "y"_a, "scales"_a.none(), "runs"_a, "n"_a, "padded"_a, "stride"_a)
        .def("feed_fixed",
             [](Player& self, bool logit_rows, std::int64_t x, std::int64_t y, std::int64_t scales, int runs, int n, int padded, int stride,
                float step) {
                 if (padded < n || stride < padded) refuse("rows of " + std::to_string(stride) + " do not hold " + std::to_string(n) + " padded");
                 if (!(step > 0)) refuse("step is " + std::to_string(step) + "; accepted: more than 0");
                 add_op<FixedFeedOp>(self, rows_named(logit_rows), place(x), place(y), place(scales), runs, n, padded, stride, step);
             },
             "logit_rows"_a, "x"_a, "y"_a, "scales"_a, "runs"_a, "n"_a, "padded"_a, "stride"_a, "step"_a)
        .def("linear",
             [](Player& self, bool logit_rows, std::shared_ptr<WeightBuffer> weight, std::int64_t x, std::optional<std::int64_t> scales,
                std::int64_t y, int stride, Floats bias) {
                 if (scales && !is_integer(weight->packed().format)) refuse("only weights of integers take int8 rows");
                 if (stride < row_elements(weight->packed())) refuse("rows of " + std::to_string(stride) + " are shorter than the weight's");
                 add_op<LinearOp>(self, rows_named(logit_rows), std::move(weight), place(x),
                                  scales ? std::optional(place(*scales)) : std::nullopt, place(y), stride, std::move(bias));
             },
             "logit_rows"_a, "weight"_a, "x"_a, "scales"_a.none(), "y"_a, "stride"_a, "bias"_a)
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
        .def("route",
             [](Player& self, std::int64_t logits, std::int64_t experts, std::int64_t weights, int count, int top_k, bool sigmoid, bool normalize,
                float scale, int groups, int top_groups, Floats correction) {
                 const RouteShape shape{count, top_k, sigmoid ? Score::sigmoid : Score::softmax, normalize, scale, groups, top_groups};
                 if (!can_route(shape)) refuse(std::to_string(top_k) + " experts cannot be chosen of " + std::to_string(count) + " in these groups");
                 self.tape.need_scratch(route_scratch(shape));
                 add_op<RouteOp>(self, shape, std::move(correction), place(logits), place(experts), place(weights));
             },
             "logits"_a, "experts"_a, "weights"_a, "count"_a, "top_k"_a, "sigmoid"_a, "normalize"_a, "scale"_a, "groups"_a, "top_groups"_a,
             "correction"_a)
        .def("group_by_expert",
             [](Player& self, std::int64_t experts, std::int64_t starts, std::int64_t places, int count, int top_k) {
                 add_op<GroupByExpertOp>(self, count, top_k, place(experts), place(starts), place(places));
             },
             "experts"_a, "starts"_a, "places"_a, "count"_a, "top_k"_a)
        .def("gather_rows",
             [](Player& self, std::int64_t x, std::int64_t scales, std::int64_t places, std::int64_t y, std::int64_t y_scales, int top_k,
                std::size_t row_bytes, bool scaled) {
                 add_op<GatherRowsOp>(self, top_k, row_bytes, scaled, place(x), place(scales), place(places), place(y), place(y_scales));
             },
             "x"_a, "scales"_a, "places"_a, "y"_a, "y_scales"_a, "top_k"_a, "row_bytes"_a, "scaled"_a)
        .def("expert_linear",
             [](Player& self, std::shared_ptr<ExpertWeights> weights, bool scaled, std::int64_t x, std::int64_t scales, std::int64_t starts,
                std::int64_t y, int stride, Floats bias) {
                 const PackedLinear first = weights->packed().front();
                 if (scaled && !is_integer(first.format)) refuse("only weights of integers take int8 rows");
                 if (stride < row_elements(first)) refuse("rows of " + std::to_string(stride) + " are shorter than the weight's");
                 if (!bias.empty() && bias.size() != weights->packed().size() * static_cast<std::size_t>(first.out))
                     refuse("bias must have a number for each expert's output channels");
                 add_op<ExpertLinearOp>(self, std::move(weights), scaled, place(x), place(scales), place(starts), place(y), stride, std::move(bias));
             },
             "weights"_a, "scaled"_a, "x"_a, "scales"_a, "starts"_a, "y"_a, "stride"_a, "bias"_a)
        .def("combine",
             [](Player& self, std::int64_t x, std::int64_t weights, std::int64_t places, std::int64_t y, int top_k, int n) {
                 add_op<CombineOp>(self, top_k, n, place(x), place(weights), place(places), place(y));
             },
             "x"_a, "weights"_a, "places"_a, "y"_a, "top_k"_a, "n"_a)
        .def("embed_positions",
             [](Player& self, FloatTable table, std::int64_t y) {
                 if (table.shape(0) < static_cast<std::size_t>(self.context())) refuse("the table has fewer positions than the context");
                 self.kept.append(table.cast());
                 add_op<EmbedPositionsOp>(self, table.data(), static_cast<int>(table.shape(1)), place(y));
             },
             "table"_a, "y"_a)
        .def("layer_norm",
             [](Player& self, bool logit_rows, std::int64_t x, std::int64_t y, int n, int group, Floats weight, Floats bias, float eps) {
                 if (!bias.empty() && bias.size() != weight.size()) refuse("a bias must be as long as its weight");
                 add_op<LayerNormOp>(self, rows_named(logit_rows), place(x), place(y), n, group, std::move(weight), std::move(bias), eps);
             },
             "logit_rows"_a, "x"_a, "y"_a, "n"_a, "group"_a, "weight"_a, "bias"_a, "eps"_a)
        .def("activate",
             [](Player& self, bool logit_rows, const std::string& activation, std::int64_t x, std::int64_t y, int n) {
                 add_op<ActivateOp>(self, rows_named(logit_rows), activation_named(activation), place(x), place(y), n);
             },
             "logit_rows"_a, "activation"_a, "x"_a, "y"_a, "n"_a)
        .def("scale", number_op<scale>, "logit_rows"_a, "x"_a, "y"_a, "n"_a, "factor"_a)
        .def("clip", number_op<clip>, "logit_rows"_a, "x"_a, "y"_a, "n"_a, "limit"_a)
        .def("soft_cap", number_op<soft_cap>, "logit_rows"_a, "x"_a, "y"_a, "n"_a, "cap"_a)
        .def("gate_rows",
             [](Player& self, const std::string& activation, std::int64_t gate, std::int64_t up, std::int64_t y, int n) {
                 add_op<GateRowsOp>(self, activation_named(activation), place(gate), place(up), place(y), n);
             },
             "activation"_a, "gate"_a, "up"_a, "y"_a, "n"_a)
        .def("clamped_swiglu",
             [](Player& self, std::int64_t gate, std::int64_t up, std::int64_t y, int n, float alpha, float limit) {
                 add_op<ClampedSwigluOp>(self, place(gate), place(up), place(y), n, alpha, limit);
             },
             "gate"_a, "up"_a, "y"_a, "n"_a, "alpha"_a, "limit"_a)
        .def("copy_features",
             [](Player& self, bool logit_rows, int heads, const std::vector<CopiedPart>& parts) {
                 std::vector<CopyFeaturesOp::Part> copies;
                 for (const auto& [x, y, size, x_head, x_at, y_head, y_at] : parts) copies.push_back({place(x), place(y), size, x_head, x_at, y_head, y_at});
                 add_op<CopyFeaturesOp>(self, rows_named(logit_rows), heads, std::move(copies));
             },
             "logit_rows"_a, "heads"_a, "parts"_a)
        .def("feed_heads",
             [](Player& self, std::int64_t x, std::int64_t y, int heads, int n, int padded, int stride) {
                 if (heads < 1 || padded < n || stride < padded) refuse("heads of " + std::to_string(stride) + " do not hold " + std::to_string(n) + " padded");
                 add_op<FeedHeadsOp>(self, place(x), place(y), heads, n, padded, stride);
             },
             "x"_a, "y"_a, "heads"_a, "n"_a, "padded"_a, "stride"_a)
        .def("head_linear",
             [](Player& self, std::vector<std::shared_ptr<WeightBuffer>> weights, std::int64_t x, std::int64_t y, int stride) {
                 if (weights.empty()) refuse("a weight for each head is needed");
                 for (const auto& weight : weights) {
                     const PackedLinear &its = weight->packed(), &first = weights[0]->packed();
                     if (its.format != WeightFormat::bf16 || its.out != first.out || its.in != first.in) refuse("heads need bf16 weights of one shape");
                     if (stride < its.padded_in()) refuse("heads of " + std::to_string(stride) + " are shorter than the weight's rows");
                 }
                 add_op<HeadLinearOp>(self, std::move(weights), place(x), place(y), stride);
             },
             "weights"_a, "x"_a, "y"_a, "stride"_a)
        .def("causal_conv",
             [](Player& self, int group, int slot, std::int64_t x, std::int64_t y, int channels, int taps, Numbers weight, Floats bias,
                std::optional<std::string> activation) {
                 add_op<CausalConvOp>(self, states_of(self.tape, group), group, slot, place(x), place(y), channels, taps, copied(weight), std::move(bias),
                                      activation ? std::optional(activation_named(*activation)) : std::nullopt);
             },
             "group"_a, "slot"_a, "x"_a, "y"_a, "channels"_a, "taps"_a, "weight"_a, "bias"_a, "activation"_a.none())
        .def("selective_scan",
             [](Player& self, int group, int slot, std::int64_t x, std::int64_t dt, std::int64_t b, std::int64_t c, std::int64_t y, int channels,
                int states, Numbers a_log, Floats d, Floats dt_bias) {
                 add_op<SelectiveScanOp>(self, states_of(self.tape, group), group, slot,
                                         SelectiveScanOp::Places{place(x), place(dt), place(b), place(c), place(y)}, channels, states, copied(a_log),
                                         std::move(d), std::move(dt_bias));
             },
             "group"_a, "slot"_a, "x"_a, "dt"_a, "b"_a, "c"_a, "y"_a, "channels"_a, "states"_a, "a_log"_a, "d"_a, "dt_bias"_a)
        .def("dual_scan",
             [](Player& self, int group, int slot, std::int64_t x, std::int64_t dt, std::int64_t b, std::int64_t c, std::int64_t y, int heads,
                int groups, int head_dim, int states, Floats a_log, Floats d, Floats dt_bias, float dt_min, float dt_max) {
                 add_op<DualScanOp>(self, states_of(self.tape, group), group, slot,
                                    DualScanOp::Places{place(x), place(dt), place(b), place(c), place(y)},
                                    DualScanOp::Sizes{heads, groups, head_dim, states}, a_log, std::move(d), std::move(dt_bias), dt_min, dt_max);
             },
             "group"_a, "slot"_a, "x"_a, "dt"_a, "b"_a, "c"_a, "y"_a, "heads"_a, "groups"_a, "head_dim"_a, "states"_a, "a_log"_a, "d"_a,
             "dt_bias"_a, "dt_min"_a, "dt_max"_a)
        .def("gated_delta_scan",
             [](Player& self, int group, int slot, std::int64_t q, std::int64_t k, std::int64_t v, std::int64_t a, std::int64_t b, std::int64_t y,
                int key_heads, int value_heads, int key_dim, int value_dim, Floats a_log, Floats dt_bias) {
                 self.tape.need_scratch(2 * static_cast<std::size_t>(key_dim));
                 add_op<GatedDeltaScanOp>(self, states_of(self.tape, group), group, slot,
                                          GatedDeltaScanOp::Places{place(q), place(k), place(v), place(a), place(b), place(y)},
                                          GatedDeltaScanOp::Sizes{key_heads, value_heads, key_dim, value_dim}, a_log, std::move(dt_bias));
             },
             "group"_a, "slot"_a, "q"_a, "k"_a, "v"_a, "a"_a, "b"_a, "y"_a, "key_heads"_a, "value_heads"_a, "key_dim"_a, "value_dim"_a, "a_log"_a,
             "dt_bias"_a)
        .def("linear_scan",
             [](Player& self, int group, int slot, std::int64_t q, std::int64_t k, std::int64_t v, std::int64_t y, int heads, int kv_heads,
                int head_dim, int value_dim, float floor) {
                 if (kv_heads < 1 || heads % kv_heads) refuse("kv_heads must divide the heads");
                 const LinearScanShape shape{heads, kv_heads, head_dim, value_dim, floor};
                 self.tape.need_scratch(shape.scratch());
                 add_op<LinearScanOp>(self, states_of(self.tape, group), group, slot, LinearScanOp::Places{place(q), place(k), place(v), place(y)}, shape);
             },
             "group"_a, "slot"_a, "q"_a, "k"_a, "v"_a, "y"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "value_dim"_a, "floor"_a)
        .def("select_rows", [](Player& self, std::int64_t x, std::int64_t y, int n) { add_op<SelectRowsOp>(self, place(x), place(y), n); },
             "x"_a, "y"_a, "n"_a)
        .def("open_chain", &Player::open_chain, "most_rows"_a, "block_bytes"_a)
        .def("open_products", &Player::open_products)
        .def("close", &Player::close)
        .def("run", &Player::run, "tokens"_a, "positions"_a, "offsets"_a, "rows"_a, "tables"_a, "logits"_a,
             "Play a batch and fill ``logits`` [R, vocab]; returns how often the threads met. Raises ValueError for ids, positions, rows or\n"
             "pages out of range, and plays nothing then.")
        .def("profile", &Player::profile, "tokens"_a, "positions"_a, "offsets"_a, "rows"_a, "tables"_a, "logits"_a, "op_ns"_a.noconvert(),
             "The same with a clock, which adds each op's nanoseconds on each thread to ``op_ns`` [ops, threads]: (nanoseconds of the whole\n"
             "without the clock's, the clock's).");
}

}  // namespace hasten
