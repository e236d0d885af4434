"""The audit: the code that trains, held against exact gradients."""

from upslope.auditing.audit import audit as audit
from upslope.auditing.declared import Circumstances as Circumstances
from upslope.auditing.loss_audit import LossAudit as LossAudit
from upslope.auditing.loss_audit import audit_loss as audit_loss
from upslope.auditing.moments import Moments as Moments
from upslope.auditing.moments import exact_moments as exact_moments
from upslope.auditing.moments import sampled_moments as sampled_moments
from upslope.auditing.report import AuditReport as AuditReport
