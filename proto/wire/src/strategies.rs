//! Arbitrary values of the types, within what the wire takes. Only for tests.

use crate::limits::{MAX_COUNT, MAX_LANES, MAX_SLICES, MAX_UNITS};
use caravan_types::message::{
    Activity, Committed, Farewell, FromWorker, Hello, Refusal, Report, SPEEDS, ToWorker, Welcome,
};
use caravan_types::non_finite::{Finding, LayerPart, Module, Sample, Tensor, Value};
use caravan_types::peak::FLOPS;
use caravan_types::peer::{Key, LaneResult, PeerMessage, Prepared, SliceVote};
use caravan_types::progress::{Awaited, Doing, EngineProgress, Place, Wait};
use caravan_types::run_spec::RUN_SPEC_VERSION;
use caravan_types::status::{Event, LoggedEvent, LossReason, Phase, Snapshot, StepMetrics, WorkerStatus};
use caravan_types::task::SavedPart;
use caravan_types::timing::millis;
use caravan_types::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use std::ops::Range;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

/// A step, generation or worker number; small ones and those at the border more often.
pub(crate) fn counter() -> BoxedStrategy<u64> {
    prop_oneof![0..5u64, 0..MAX_COUNT, Just(MAX_COUNT - 1)].boxed()
}

/// A number that equals itself.
fn real() -> BoxedStrategy<f64> {
    any::<f64>().prop_filter("NaN is not equal to itself", |x| !x.is_nan()).boxed()
}

fn step() -> impl Strategy<Value = Step> {
    counter().prop_map(Step)
}

fn generation() -> impl Strategy<Value = Generation> {
    counter().prop_map(Generation)
}

fn worker() -> impl Strategy<Value = WorkerId> {
    counter().prop_map(WorkerId)
}

fn slice() -> impl Strategy<Value = SliceId> {
    prop_oneof![0..9u32, Just(MAX_SLICES - 1)].prop_map(SliceId)
}

fn digest() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest)
}

fn text() -> BoxedStrategy<String> {
    ".{0,20}".boxed()
}

fn set(limit: u32) -> impl Strategy<Value = SliceSet> {
    vec(0..limit, 0..20).prop_map(|ids| ids.into_iter().map(SliceId).collect())
}

fn range(limit: u32) -> impl Strategy<Value = Range<u32>> {
    (0..=limit, 0..=limit).prop_map(|(a, b)| a.min(b)..a.max(b))
}

fn part() -> impl Strategy<Value = Part> {
    prop_oneof![Just(Part::Weights), Just(Part::State)]
}

fn activity() -> impl Strategy<Value = Activity> {
    use Activity::*;
    prop::sample::select(vec![Waiting, Healing, Computing, Reducing, Preparing, Publishing, Finished])
}

pub(crate) fn run_spec() -> impl Strategy<Value = RunSpec> {
    let finite = any::<f64>().prop_filter("JSON has finite numbers only", |x| x.is_finite());
    let rope = (1e-9f32..1e9, option::of(rope_scaling()));
    let init = prop_oneof![Just(Initial::Seed), digest().prop_map(|digest| Initial::Weights { digest })];
    let numbers = (any::<(u64, u64, u32)>(), [finite.clone(), finite]);
    (text(), digest(), numbers, text(), rope, init).prop_map(
        |(name, digest, numbers, family, (rope_theta, rope_scaling), init)| {
            let ((seed, tokens, lanes), [learning_rate, beta1]) = numbers;
            RunSpec {
                version: RUN_SPEC_VERSION,
                name,
                model: ModelShape { rope_theta, rope_scaling, ..ModelShape::preset("15m").unwrap() },
                data: DataSpec { digest, tokens },
                batch: BatchShape { lanes, micro_batches: 2, sequences: 3, sequence_length: 4 },
                recipe: Recipe { learning_rate, beta1, ..Recipe::default() },
                init,
                seed,
                numerics: NumericsClass { precision: Precision::Fp32, family },
            }
        },
    )
}

fn rope_scaling() -> impl Strategy<Value = RopeScaling> {
    prop_oneof![
        (1f32..100.0).prop_map(|factor| RopeScaling::Linear { factor }),
        (1f32..100.0, 0.1f32..2.0, 2f32..9.0, 1..1u32 << 20).prop_map(
            |(factor, low_freq_factor, high_freq_factor, original_context)| RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            }
        ),
    ]
}

pub(crate) fn hello() -> impl Strategy<Value = Hello> {
    let able = (any::<(u32, u32, u64)>(), SPEEDS, option::of(worker()));
    (able, [text(), text(), text(), text()], vec(text(), 0..4)).prop_map(
        |(((protocol, threads, memory), speed, resume), [build, name, host, fabric], families)| Hello {
            protocol,
            build,
            name,
            host,
            fabric,
            families,
            threads,
            resume,
            memory,
            speed,
        },
    )
}

fn peak() -> impl Strategy<Value = Peak> {
    (FLOPS, 1..=u32::MAX, 1..=u32::MAX, text()).prop_map(|(thread, threads, cores, place)| Peak {
        thread,
        threads,
        cores,
        place,
    })
}

pub(crate) fn welcome() -> impl Strategy<Value = Welcome> {
    (
        worker(),
        run_spec(),
        (any::<u32>(), timing(), any::<u64>()),
        text(),
        (text(), option::of(text())),
        step(),
    )
        .prop_map(
            |(worker, spec, (redundancy, timing, checkpoint_every), data, (checkpoints, init), committed)| {
                Welcome {
                    worker,
                    spec,
                    redundancy,
                    timing,
                    checkpoint_every,
                    data,
                    checkpoints,
                    init,
                    committed,
                }
            },
        )
}

/// Times in order: each that is set is within its range.
fn timing() -> impl Strategy<Value = Timing> {
    let part = |range: RangeInclusive<Duration>, part: f64| {
        Duration::from_millis(millis(range.start().mul_f64(1.0 - part) + range.end().mul_f64(part)))
    };
    (100..=600_000u64, option::of(0.0..=1.0), option::of(0.01..=1.0)).prop_map(
        move |(detect_ms, heartbeat, reattach)| {
            let timing = Timing::from_millis(detect_ms);
            timing
                .with_heartbeat(heartbeat.map(|p| part(timing.heartbeats(), p)))
                .with_reattach(reattach.map(|p| part(timing.reattaches(), p)))
        },
    )
}

pub(crate) fn refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        any::<(u32, u32)>().prop_map(|(ours, theirs)| Refusal::Protocol { ours, theirs }),
        (text(), vec(text(), 0..3)).prop_map(|(needed, offered)| Refusal::Numerics { needed, offered }),
        farewell().prop_map(Refusal::Over),
        Just(Refusal::NotTaking),
        (worker(), generation()).prop_map(|(worker, generation)| Refusal::Fenced { worker, generation }),
    ]
}

fn verdict() -> impl Strategy<Value = Verdict> {
    prop_oneof![Just(Verdict::Skip), real().prop_map(|norm| Verdict::of(norm, 0.0))]
}

/// A finding with a sample, or without.
fn finding() -> impl Strategy<Value = Finding> {
    use LayerPart::*;
    let parts = vec![Input, AttentionNorm, Qkv, Attention, Output, MlpNorm, GateUp, Activated, Down];
    let layer =
        (any::<u32>(), prop::sample::select(parts)).prop_map(|(layer, part)| Module::Layer(layer, part));
    let ends = vec![Module::Embedding, Module::FinalNorm, Module::Logits, Module::Loss];
    let module = || layer.clone().boxed().prop_union(prop::sample::select(ends.clone()).boxed());
    let name = || "[a-z_.0-9]{0,60}";
    let tensor = prop_oneof![
        name().prop_map(Tensor::Weight),
        module().prop_map(Tensor::Activation),
        module().prop_map(Tensor::ActivationGradient),
        name().prop_map(Tensor::WeightGradient),
    ];
    let value = prop::sample::select(vec![Value::Nan, Value::Infinity, Value::NegativeInfinity]);
    let sample = (micro(), any::<(u32, u64, Option<u32>)>())
        .prop_map(|(micro, (sequence, number, position))| Sample { micro, sequence, number, position });
    (tensor, any::<u64>(), value, option::of(sample)).prop_map(|(tensor, element, value, sample)| Finding {
        tensor,
        element,
        value,
        sample,
    })
}

fn not_finite() -> impl Strategy<Value = NotFinite> {
    prop::sample::select(vec![NotFinite::Loss, NotFinite::Gradient])
}

fn report() -> impl Strategy<Value = Report> {
    let sets = (set(MAX_SLICES), set(300), option::of(set(300)));
    (generation(), step(), option::of(verdict()), sets, sums()).prop_map(
        |(generation, applied, verdict, (state, weights, prepared), sums)| Report {
            generation,
            applied,
            verdict,
            state,
            weights,
            prepared,
            sums,
        },
    )
}

fn slice_sum() -> impl Strategy<Value = SliceSum> {
    (any::<u32>(), option::of(any::<u32>())).prop_map(|(weights, moments)| SliceSum {
        weights: Checksum(weights),
        moments: moments.map(Checksum),
    })
}

fn sums() -> impl Strategy<Value = Vec<(SliceId, SliceSum)>> {
    vec((slice(), slice_sum()), 0..4)
}

fn subject() -> impl Strategy<Value = Subject> {
    prop_oneof![Just(Subject::Gradient), Just(Subject::State)]
}

fn disputes() -> impl Strategy<Value = Vec<Dispute>> {
    let said = vec((worker(), any::<u64>().prop_map(Opinion)), 0..4);
    let dispute = (slice(), step(), subject(), said).prop_map(|(slice, step, subject, said)| Dispute {
        slice,
        step,
        subject,
        said,
    });
    vec(dispute, 0..3)
}

fn saved_part() -> impl Strategy<Value = SavedPart> {
    (text(), any::<u64>(), digest(), vec((slice(), digest()), 0..4))
        .prop_map(|(file, bytes, digest, slices)| SavedPart { file, bytes, digest, slices })
}

pub(crate) fn from_worker() -> impl Strategy<Value = FromWorker> {
    prop_oneof![
        (step(), activity(), wait(), any::<(u64, u64, u64)>(), doing()).prop_map(
            |(applied, activity, wait, (moved, busy_ms, work), doing)| {
                let engine = EngineProgress { moved, doing, busy_ms, work };
                FromWorker::Heartbeat { applied, activity, wait, engine }
            }
        ),
        peak().prop_map(FromWorker::Peak),
        report().prop_map(FromWorker::Report),
        (generation(), step(), real(), real(), any::<(u64, u64)>()).prop_map(
            |(generation, step, loss, norm, (tokens, took_ms))| {
                FromWorker::Committed(Committed { generation, step, loss, norm, tokens, took_ms })
            }
        ),
        (generation(), worker()).prop_map(|(generation, peer)| FromWorker::PeerLost { generation, peer }),
        (generation(), step(), disputes()).prop_map(|(generation, step, disputes)| FromWorker::Diverged {
            generation,
            step,
            disputes
        }),
        (generation(), disputes())
            .prop_map(|(generation, disputes)| FromWorker::Settled { generation, disputes }),
        text().prop_map(|what| FromWorker::Corrupt { what }),
        (generation(), step(), sums()).prop_map(|(generation, step, sums)| FromWorker::Vouched {
            generation,
            step,
            sums
        }),
        (generation(), step(), saved_part().prop_map(Ok).boxed().prop_union(text().prop_map(Err).boxed()))
            .prop_map(|(generation, step, part)| FromWorker::Saved { generation, step, part }),
        (generation(), step(), text()).prop_map(|(generation, step, reason)| FromWorker::LoadFailed {
            generation,
            step,
            reason
        }),
        (generation(), step(), not_finite(), any::<bool>(), option::of(finding())).prop_map(
            |(generation, step, what, skipped, finding)| {
                FromWorker::NonFinite(NonFinite { generation, step, what, skipped, finding })
            }
        ),
        Just(FromWorker::Leaving),
    ]
}

fn pipeline() -> impl Strategy<Value = Pipeline> {
    let stage = (worker(), range(MAX_UNITS)).prop_map(|(worker, units)| Stage { worker, units });
    (vec(stage, 0..3), range(MAX_LANES)).prop_map(|(stages, lanes)| Pipeline { stages, lanes })
}

fn transfer(slices: u32) -> impl Strategy<Value = Transfer> {
    let source = prop_oneof![worker().prop_map(Source::Peer), Just(Source::Checkpoint), Just(Source::Init)];
    (worker(), source, part(), set(slices)).prop_map(|(to, from, part, slices)| Transfer {
        to,
        from,
        part,
        slices,
    })
}

pub(crate) fn plan() -> impl Strategy<Value = Plan> {
    let members = prop::collection::btree_map(worker(), text(), 0..5)
        .prop_map(|members| members.into_iter().map(|(worker, fabric)| Member { worker, fabric }).collect());
    let owners = vec(vec(worker(), 0..4), 1..40);
    use IdleReason::*;
    let reasons =
        vec![MoreWorkersThanLanes, Leaving, TooSmall, NoRoomForAStage, WouldSlow, TooFewForAPipeline];
    let idle = vec((worker(), prop::sample::select(reasons)), 0..3);
    (
        generation(),
        step(),
        (option::of(verdict()), any::<bool>()),
        members,
        vec(pipeline(), 0..3),
        owners,
        idle,
    )
        .prop_flat_map(|(generation, base, (verdict, recompute), members, pipelines, owners, idle)| {
            let (transfers, none) = (vec![], vec![]);
            let plan = Plan {
                generation,
                base,
                verdict,
                recompute,
                members,
                pipelines,
                owners,
                transfers,
                idle,
                disputes: none,
            };
            (vec(transfer(plan.owners.len() as u32), 0..4), disputes())
                .prop_map(move |(transfers, disputes)| Plan { transfers, disputes, ..plan.clone() })
        })
}

fn farewell() -> impl Strategy<Value = Farewell> {
    use Farewell::*;
    prop::sample::select(vec![Finished, Drained, Left, Fenced, Failed, Corrupt, Farewell::NonFinite])
}

pub(crate) fn to_worker() -> impl Strategy<Value = ToWorker> {
    prop_oneof![
        (generation(), any::<bool>())
            .prop_map(|(generation, boundary)| ToWorker::Stop { generation, boundary }),
        plan().prop_map(|plan| ToWorker::Plan(Arc::new(plan))),
        (generation(), step(), set(MAX_SLICES)).prop_map(|(generation, step, slices)| ToWorker::Save {
            generation,
            step,
            slices
        }),
        farewell().prop_map(ToWorker::Goodbye),
    ]
}

fn metrics() -> impl Strategy<Value = StepMetrics> {
    let reals = ([real(), real(), real(), real()], option::of(real()));
    (step(), generation(), reals, any::<(u64, u32, u64)>()).prop_map(
        |(
            step,
            generation,
            ([loss, norm, learning_rate, tokens_per_second], mfu),
            (tokens, workers, unix_ms),
        )| {
            StepMetrics {
                step,
                generation,
                loss,
                norm,
                learning_rate,
                tokens,
                tokens_per_second,
                mfu,
                workers,
                unix_ms,
            }
        },
    )
}

fn worker_status() -> impl Strategy<Value = WorkerStatus> {
    (worker(), text(), range(MAX_LANES), 0..=MAX_SLICES, activity(), step(), any::<(bool, u64)>()).prop_map(
        |(worker, name, lanes, owned_slices, activity, applied, (member, silent_ms))| WorkerStatus {
            worker,
            name,
            member,
            lanes: (lanes.start, lanes.end),
            owned_slices,
            activity,
            applied,
            silent_ms,
        },
    )
}

pub(crate) fn phase() -> impl Strategy<Value = Phase> {
    use Phase::*;
    prop::sample::select(vec![
        Gathering, Recovering, Regrouping, Running, Draining, Drained, Finished, Failed,
    ])
}

pub(crate) fn snapshot() -> impl Strategy<Value = Snapshot> {
    let newest = (option::of(metrics()), option::of(real()), option::of(step()));
    let counts = (counter(), counter());
    (text(), phase(), generation(), step(), counts, newest, vec(worker_status(), 0..4)).prop_map(
        |(run, phase, generation, step, (steps, skipped), (last, eta_seconds, checkpoint), workers)| {
            Snapshot { run, phase, generation, step, steps, last, eta_seconds, checkpoint, skipped, workers }
        },
    )
}

fn event() -> impl Strategy<Value = Event> {
    use LossReason::*;
    let reason = prop::sample::select(vec![
        SessionClosed,
        Silent,
        Left,
        Misbehaved,
        NotBack,
        Hung,
        Unreachable,
        Corrupt,
        CannotLoad,
    ]);
    prop_oneof![
        (worker(), text()).prop_map(|(worker, name)| Event::Joined { worker, name }),
        (worker(), text()).prop_map(|(worker, name)| Event::Reattached { worker, name }),
        generation().prop_map(|generation| Event::Recovered { generation }),
        (worker(), 100..100_000u32)
            .prop_map(|(worker, percent)| Event::Slow { worker, factor: f64::from(percent) / 100.0 }),
        worker().prop_map(|worker| Event::Recovers { worker }),
        (worker(), doing(), option::of(worker()), any::<u64>()).prop_map(
            |(worker, doing, waiting, still_ms)| Event::Hung {
                worker,
                doing,
                waiting,
                still_ms,
                wait: Wait::Plan
            }
        ),
        (text(), refusal()).prop_map(|(name, reason)| Event::Refused { name, reason }),
        (worker(), reason).prop_map(|(worker, reason)| Event::Lost { worker, reason }),
        (generation(), any::<bool>())
            .prop_map(|(generation, boundary)| Event::Stopping { generation, boundary }),
        (generation(), step(), vec(worker(), 0..4), any::<u64>(), any::<u64>()).prop_map(
            |(generation, base, members, moved, bytes)| Event::Planned {
                generation,
                base,
                members,
                moved,
                bytes
            }
        ),
        (step(), step()).prop_map(|(from, to)| Event::RolledBack { from, to }),
        step().prop_map(|step| Event::CheckpointWritten { step }),
        (step(), text()).prop_map(|(step, reason)| Event::CheckpointFailed { step, reason }),
        (text(), text()).prop_map(|(name, reason)| Event::CheckpointRefused { name, reason }),
        (slice(), step(), subject(), vec(worker(), 0..4))
            .prop_map(|(slice, step, subject, owners)| { Event::Diverged { slice, step, subject, owners } }),
        (worker(), text()).prop_map(|(worker, what)| Event::Corrupt { worker, what }),
        (worker(), step(), text()).prop_map(|(worker, step, reason)| Event::LoadFailed {
            worker,
            step,
            reason
        }),
        (step(), not_finite()).prop_map(|(step, what)| Event::Skipped { step, what }),
        (worker(), step(), finding()).prop_map(|(worker, step, finding)| Event::NonFinite {
            worker,
            step,
            finding
        }),
        Just(Event::Draining),
        step().prop_map(|step| Event::Drained { step }),
        step().prop_map(|step| Event::Finished { step }),
        text().prop_map(|reason| Event::Failed { reason }),
        text().prop_map(|reason| Event::NoPlan { reason }),
    ]
}

pub(crate) fn logged_event() -> impl Strategy<Value = LoggedEvent> {
    (any::<(u64, u64)>(), step(), text(), event())
        .prop_map(|((number, unix_ms), step, text, event)| LoggedEvent { number, unix_ms, step, text, event })
}

fn node() -> impl Strategy<Value = Node> {
    (0..=20u8).prop_flat_map(|level| (0..MAX_LANES >> level).prop_map(move |index| Node { level, index }))
}

fn wait() -> impl Strategy<Value = Wait> {
    let key = (step(), micro()).prop_map(|(step, micro)| Awaited::Data(Key::Activation { step, micro }));
    let what = key.boxed().prop_union(step().prop_map(Awaited::Vote).boxed());
    let peer = (worker(), what).prop_map(|(peer, what)| Wait::Peer { peer, what });
    prop_oneof![Just(Wait::Plan), Just(Wait::Engine), peer]
}

fn doing() -> impl Strategy<Value = Doing> {
    let place = || (micro(), any::<u32>()).prop_map(|(micro, unit)| Place { micro, unit });
    prop_oneof![
        prop::sample::select(vec![Doing::Nothing, Doing::Moving, Doing::Reducing, Doing::Loading]),
        place().prop_map(Doing::Forward),
        place().prop_map(Doing::Backward),
    ]
}

fn micro() -> impl Strategy<Value = MicroId> {
    (0..MAX_LANES, any::<u32>()).prop_map(|(lane, index)| MicroId { lane, index })
}

fn prepared() -> impl Strategy<Value = Prepared> {
    let vote = (slice(), vec(real(), 0..6), any::<u32>(), slice_sum()).prop_map(
        |(slice, norms, gradient, state)| SliceVote { slice, norms, gradient: Checksum(gradient), state },
    );
    let slices = (vec(vote, 0..5), any::<u64>().prop_map(Opinion));
    let lane = (0..MAX_LANES, real(), counter());
    let lanes = vec(lane.prop_map(|(lane, loss, tokens)| LaneResult { lane, loss, tokens }), 0..5);
    (step(), slices, lanes, option::of(generation())).prop_map(
        |(step, (slices, weights), lanes, stop_for)| Prepared { step, slices, weights, lanes, stop_for },
    )
}

pub(crate) fn peer_message() -> impl Strategy<Value = PeerMessage> {
    prop_oneof![
        (step(), slice(), node()).prop_map(|(step, slice, node)| PeerMessage::Data(Key::Partial {
            step,
            slice,
            node
        })),
        (step(), slice()).prop_map(|(step, slice)| PeerMessage::Data(Key::Weights { step, slice })),
        (step(), slice()).prop_map(|(step, slice)| PeerMessage::Data(Key::State { step, slice })),
        (step(), micro()).prop_map(|(step, micro)| PeerMessage::Data(Key::Activation { step, micro })),
        (step(), micro())
            .prop_map(|(step, micro)| PeerMessage::Data(Key::ActivationGradient { step, micro })),
        prepared().prop_map(PeerMessage::Prepared),
    ]
}
