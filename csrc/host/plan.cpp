#include "host/plan.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "host/expression.h"
#include "host/torch_objects.h"
#include "host/triton_objects.h"

namespace recattn::host {

namespace {

// The types of recattn.ops._plans.
struct Types {
    PyObject *slot, *pointer, *expression, *integer;
};

// What a step takes, or the result: an object as it is, what a replay finds out, or a tuple or list of these.
struct Node {
    enum class Kind { kObject, kSlot, kPointer, kInteger, kTuple, kList } kind = Kind::kObject;
    Reference object;  // of a tuple its type
    size_t slot = 0;
    Expression expression;
    std::vector<Node> fields;

    bool read(PyObject* value, const Types& types);
};

bool Node::read(PyObject* value, const Types& types) {
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    if (type == types.slot || type == types.pointer) {
        kind = type == types.slot ? Kind::kSlot : Kind::kPointer;
        slot = static_cast<size_t>(PyLong_AsSsize_t(PyTuple_GET_ITEM(value, 0)));
        return !PyErr_Occurred();
    }
    if (type == types.integer) {
        kind = Kind::kInteger;
        return expression.read(PyTuple_GET_ITEM(value, 0), types.expression);
    }
    if (!PyTuple_Check(value) && !PyList_Check(value)) {
        object = Reference(new_reference(value));
        return true;
    }
    kind = PyList_Check(value) ? Kind::kList : Kind::kTuple;
    object = Reference(new_reference(type));
    fields.resize(static_cast<size_t>(PySequence_Fast_GET_SIZE(value)));
    for (size_t i = 0; i < fields.size(); ++i) {
        if (!fields[i].read(PySequence_Fast_GET_ITEM(value, static_cast<Py_ssize_t>(i)), types)) {
            return false;
        }
    }
    return true;
}

struct Step {
    enum class Kind { kGuard, kAligned, kCall, kLaunch } kind = Kind::kGuard;
    // A guard
    Expression a, b;
    char relation = '=';  // or < for less, or of a launch's integer what Triton knows of it: 1 d - ?
    bool outcome = true;
    size_t slot = 0;  // whose alignment is guarded, or of a call's first result
    // A call's function, or a launch's run
    Reference callable;
    Reference keywords;  // names, a tuple
    Reference function, packed_metadata;
    std::vector<Node> grid;
    std::vector<Node> arguments;

    bool read(PyObject* value, const Types& types);

  private:
    bool read_guard(PyObject* value, const Types& types);
    bool read_nodes(PyObject* tuple, const Types& types, std::vector<Node>& nodes);
};

bool Step::read_nodes(PyObject* tuple, const Types& types, std::vector<Node>& nodes) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
        nodes.emplace_back();
        if (!nodes.back().read(PyTuple_GET_ITEM(tuple, i), types)) {
            return false;
        }
    }
    return true;
}

bool Step::read_guard(PyObject* value, const Types& types) {
    const char* text = PyUnicode_AsUTF8(PyTuple_GET_ITEM(value, 2));
    relation = text == nullptr ? '?' : text[0];
    outcome = PyTuple_GET_ITEM(value, 4) == Py_True;
    return text != nullptr && a.read(PyTuple_GET_ITEM(value, 1), types.expression) &&
           b.read(PyTuple_GET_ITEM(value, 3), types.expression);
}

bool Step::read(PyObject* value, const Types& types) {
    const char* name = PyTuple_Check(value) ? PyUnicode_AsUTF8(PyTuple_GetItem(value, 0)) : nullptr;
    if (name == nullptr) {
        return false;
    }
    if (name[0] == 'g') {
        return read_guard(value, types);
    }
    if (name[0] == 'a') {
        kind = Kind::kAligned;
        slot = static_cast<size_t>(PyLong_AsSsize_t(PyTuple_GetItem(PyTuple_GET_ITEM(value, 1), 0)));
        outcome = PyTuple_GET_ITEM(value, 2) == Py_True;
        return !PyErr_Occurred();
    }
    callable = Reference(new_reference(PyTuple_GET_ITEM(value, 1)));
    if (name[0] == 'c') {
        kind = Kind::kCall;
        keywords = Reference(new_reference(PyTuple_GET_ITEM(value, 3)));
        slot = static_cast<size_t>(PyLong_AsSsize_t(PyTuple_GET_ITEM(value, 4)));
        return read_nodes(PyTuple_GET_ITEM(value, 2), types, arguments);
    }
    kind = Kind::kLaunch;
    function = Reference(new_reference(PyTuple_GET_ITEM(value, 2)));
    packed_metadata = Reference(new_reference(PyTuple_GET_ITEM(value, 3)));
    if (!read_nodes(PyTuple_GET_ITEM(value, 4), types, grid)) {
        return false;
    }
    while (grid.size() < 3) {
        grid.emplace_back();
        grid.back().object = Reference(PyLong_FromLong(1));
    }
    return read_nodes(PyTuple_GET_ITEM(value, 5), types, arguments);
}

struct Plan {
    size_t num_inputs = 0;
    size_t num_slots = 0;
    bool launches = false;
    std::vector<Step> steps;
    Node result;
};

// One call of a plan.
class Replay {
  public:
    explicit Replay(const Plan& plan) : plan_(plan), slots_(plan.num_slots) {}

    // The tensors of the arguments, in order.
    void add_inputs(PyObject* value) {
        if (PyTuple_Check(value)) {
            for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
                add_inputs(PyTuple_GET_ITEM(value, i));
            }
        } else if (is_plain_tensor(value) && num_inputs_++ < plan_.num_inputs) {
            slots_[num_inputs_ - 1] = Slot(new_reference(value));
        }
    }

    // NotImplemented where the plan does not hold.
    PyObject* run(const CurrentStream* stream) {
        for (const Step& step : plan_.steps) {
            if (!run(step, stream)) {
                return PyErr_Occurred() ? nullptr : new_reference(Py_NotImplemented);
            }
        }
        return build(plan_.result);
    }

    bool has_inputs() const { return num_inputs_ == plan_.num_inputs; }

  private:
    // The steps are false with an exception set, or without one where the plan does not hold.

    bool run(const Step& step, const CurrentStream* stream) {
        switch (step.kind) {
            case Step::Kind::kGuard:
                return check(step);
            case Step::Kind::kAligned:
                return check_alignment(step);
            case Step::Kind::kCall:
                return call(step);
            default:
                return launch(step, *stream);
        }
    }

    bool check(const Step& step) {
        long long a = 0, b = 0;
        if (!step.a.evaluate(slots_, a) || !step.b.evaluate(slots_, b)) {
            return false;
        }
        switch (step.relation) {
            case '=':
                return (a == b) == step.outcome;
            case '<':
                return (a < b) == step.outcome;
            case '?':
                return a == static_cast<int32_t>(a);
            default:
                return a == static_cast<int32_t>(a) && step.relation == (a == 1 ? '1' : a % 16 == 0 ? 'd' : '-');
        }
    }

    bool check_alignment(const Step& step) {
        PyObject* pointer = slots_[step.slot].pointer();
        return pointer != nullptr && (PyLong_AsUnsignedLongLongMask(pointer) % 16 == 0) == step.outcome;
    }

    bool call(const Step& step) {
        Values& values = empty_values();
        if (!build_all(step.arguments, values)) {
            return false;
        }
        const Py_ssize_t num_keywords = PyTuple_GET_SIZE(step.keywords.get());
        const size_t count = values.borrowed.size() - static_cast<size_t>(num_keywords);
        PyObject* names = num_keywords > 0 ? step.keywords.get() : nullptr;
        Reference result(PyObject_Vectorcall(step.callable.get(), values.borrowed.data(), count, names));
        if (!result) {
            return false;
        }
        if (!PyTuple_Check(result.get()) && !PyList_Check(result.get())) {
            slots_[step.slot] = Slot(result.release());
            return true;
        }
        const size_t size = static_cast<size_t>(PySequence_Fast_GET_SIZE(result.get()));
        if (step.slot + size > slots_.size()) {  // as many results as a size says, and it is another now
            return false;
        }
        for (size_t i = 0; i < size; ++i) {
            PyObject* item = PySequence_Fast_GET_ITEM(result.get(), static_cast<Py_ssize_t>(i));
            slots_[step.slot + i] = Slot(new_reference(item));
        }
        return true;
    }

    bool launch(const Step& step, const CurrentStream& stream) {
        Values& values = empty_values();
        if (!build_all(step.grid, values)) {
            return false;
        }
        for (PyObject* value :
             {stream.get(), step.function.get(), step.packed_metadata.get(), Py_None, Py_None, Py_None}) {
            values.add(new_reference(value));
        }
        if (!build_all(step.arguments, values)) {
            return false;
        }
        const Reference result(
            PyObject_Vectorcall(step.callable.get(), values.borrowed.data(), values.borrowed.size(), nullptr));
        return static_cast<bool>(result);
    }

    struct Values {
        std::vector<Reference> owned;
        std::vector<PyObject*> borrowed;

        Values() {
            owned.reserve(64);
            borrowed.reserve(64);
        }

        void add(PyObject* value) {
            owned.emplace_back(value);
            borrowed.push_back(value);
        }
    };

    bool build_all(const std::vector<Node>& nodes, Values& values) {
        for (const Node& node : nodes) {
            PyObject* value = build(node);
            if (value == nullptr) {
                return false;
            }
            values.add(value);
        }
        return true;
    }

    // A new reference; null with an exception set, or without one where the plan does not hold.
    PyObject* build(const Node& node) {
        switch (node.kind) {
            case Node::Kind::kObject:
                return new_reference(node.object.get());
            case Node::Kind::kSlot:
                return new_reference(slots_[node.slot].tensor());
            case Node::Kind::kPointer:
                return pointer(node);
            case Node::Kind::kInteger:
                return integer(node);
            default:
                return sequence(node);
        }
    }

    PyObject* pointer(const Node& node) {
        PyObject* pointer = slots_[node.slot].pointer();
        return pointer == nullptr ? nullptr : new_reference(pointer);
    }

    PyObject* integer(const Node& node) {
        PyObject* symbol = node.expression.integer(slots_);
        if (symbol != nullptr) {
            return new_reference(symbol);
        }
        long long value = 0;
        return node.expression.evaluate(slots_, value) ? PyLong_FromLongLong(value) : nullptr;
    }

    PyObject* sequence(const Node& node) {
        auto* type = reinterpret_cast<PyTypeObject*>(node.object.get());
        const Py_ssize_t size = static_cast<Py_ssize_t>(node.fields.size());
        const bool is_plain = type == &PyTuple_Type || node.kind == Node::Kind::kList;
        Reference tuple(is_plain ? PyTuple_New(size) : type->tp_alloc(type, size));
        for (Py_ssize_t i = 0; tuple && i < size; ++i) {
            PyObject* field = build(node.fields[static_cast<size_t>(i)]);
            if (field == nullptr) {
                return nullptr;
            }
            PyTuple_SET_ITEM(tuple.get(), i, field);
        }
        return tuple && node.kind == Node::Kind::kList ? PySequence_List(tuple.get()) : tuple.release();
    }

    // Of one step after the other, so that memory is allocated once.
    Values& empty_values() {
        values_.owned.clear();
        values_.borrowed.clear();
        return values_;
    }

    const Plan& plan_;
    std::vector<Slot> slots_;
    size_t num_inputs_ = 0;
    Values values_;
};

// The CUDA device of the first input, -1 for a CPU.
long first_device(PyObject* value) {
    if (PyTuple_Check(value) && PyTuple_GET_SIZE(value) > 0) {
        return first_device(PyTuple_GET_ITEM(value, 0));
    }
    const Reference index(PyObject_CallMethodNoArgs(value, torch_objects.get_device));
    return index ? PyLong_AsLong(index.get()) : -1;
}

PyObject* call_plan(PyObject* capsule, PyObject* arguments) {
    const auto* plan = static_cast<Plan*>(PyCapsule_GetPointer(capsule, "plan"));
    if (plan == nullptr || has_launch_hooks()) {
        return plan == nullptr ? nullptr : new_reference(Py_Ellipsis);
    }
    Replay replay(*plan);
    replay.add_inputs(arguments);
    if (!replay.has_inputs()) {
        return new_reference(Py_NotImplemented);
    }
    if (!plan->launches) {  // of an empty batch: there may be no driver
        return replay.run(nullptr);
    }
    const CurrentStream stream;
    const long device = stream ? first_device(arguments) : -1;
    if (PyErr_Occurred()) {
        return nullptr;
    }
    return device < 0 || device == stream.device() ? replay.run(&stream) : new_reference(Py_Ellipsis);
}

PyMethodDef plan_method = {"plan", call_plan, METH_O, "plan(arguments) -> result: csrc/host/plan.h"};

void delete_plan(PyObject* capsule) { delete static_cast<Plan*>(PyCapsule_GetPointer(capsule, "plan")); }

}  // namespace

PyObject* make_plan(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != 5 || !PyTuple_Check(arguments[0]) || PyTuple_GET_SIZE(arguments[0]) != 4 ||
        !PyTuple_Check(arguments[3])) {
        PyErr_SetString(PyExc_TypeError, "make_plan takes four types, num_inputs, num_slots, steps and result");
        return nullptr;
    }
    const Types types{PyTuple_GET_ITEM(arguments[0], 0), PyTuple_GET_ITEM(arguments[0], 1),
                      PyTuple_GET_ITEM(arguments[0], 2), PyTuple_GET_ITEM(arguments[0], 3)};
    auto plan = std::make_unique<Plan>();
    plan->num_inputs = static_cast<size_t>(PyLong_AsSsize_t(arguments[1]));
    plan->num_slots = static_cast<size_t>(PyLong_AsSsize_t(arguments[2]));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments[3]); ++i) {
        plan->steps.emplace_back();
        if (!plan->steps.back().read(PyTuple_GET_ITEM(arguments[3], i), types)) {
            return nullptr;
        }
    }
    plan->launches = std::any_of(plan->steps.begin(), plan->steps.end(),
                                 [](const Step& step) { return step.kind == Step::Kind::kLaunch; });
    if (!plan->result.read(arguments[4], types) || PyErr_Occurred()) {
        return nullptr;
    }
    const Reference capsule(PyCapsule_New(plan.get(), "plan", delete_plan));
    if (!capsule) {
        return nullptr;
    }
    plan.release();
    return PyCFunction_New(&plan_method, capsule.get());
}

}  // namespace recattn::host
