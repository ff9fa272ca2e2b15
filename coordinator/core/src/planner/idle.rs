//! Why somebody has nothing to compute.

use super::costs::{ROLES, Role};
use super::problem::Problem;
use caravan_types::{IdleReason, Pipeline};

/// What of a plan decides why others have no part in it.
pub(super) struct Reasons<'a> {
    problem: &'a Problem,
    /// Every lane has a pipeline of its own, and every pipeline as many stages as it may have.
    full: bool,
    /// Workers without a stage.
    left: usize,
}

impl<'a> Reasons<'a> {
    pub(super) fn new(problem: &'a Problem, pipelines: &[Pipeline]) -> Self {
        let deepest = problem.depth.unwrap_or(problem.costs.units()) as usize;
        let deep = pipelines.iter().all(|p| p.stages.len() >= deepest);
        let stages: usize = pipelines.iter().map(|p| p.stages.len()).sum();
        let full = deep && pipelines.len() >= problem.costs.lanes as usize;
        Self { problem, full, left: problem.workers.len() - stages }
    }

    /// Why a worker of the problem is idle.
    pub(super) fn of(&self, worker: usize) -> IdleReason {
        let costs = &self.problem.costs;
        let (room, depth) = (self.problem.workers[worker].kind.room, self.problem.depth);
        let alone =
            depth.is_none_or(|depth| depth == 1) && costs.layers_in_room(Role::Only, room, 1, 1).is_some();
        // The smallest stage, of the shallowest pipeline that has several.
        let stages = depth.unwrap_or(2);
        let part =
            stages > 1 && ROLES.iter().any(|role| costs.layers_in_room(*role, room, stages, 1).is_some());
        if !alone && !part {
            IdleReason::NoRoomForAStage
        } else if self.full {
            IdleReason::MoreWorkersThanLanes
        } else if depth.is_some_and(|depth| self.left < depth as usize) {
            IdleReason::TooFewForAPipeline
        } else {
            IdleReason::WouldSlow
        }
    }
}
